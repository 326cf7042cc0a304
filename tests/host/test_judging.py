"""Judge by Eye in a real ComfyUI: pairs go out blind, judgements come back into a file, and nothing else does."""

from __future__ import annotations

import json
import urllib.error

import pytest
from host import Server
from judged import NAMES, Pairs, hand_in, is_red, pairs, rows
from small_graphs import refusal

from difflens_core.measure import wilson_interval


@pytest.fixture(scope="module")
def asked(server: Server) -> tuple[str, Pairs]:
    """The id of a run whose pairs nobody judges well."""
    graph = Pairs(save_as="judged/refused")
    return graph.run(server)[0], graph


def test_judgements_of_two_people_are_kept_and_counted(server: Server):
    graph, path = Pairs(catch_pairs=1), server.output_dir / "judged" / "by_eye.csv"
    run, judged, told = graph.run(server)
    assert judged["pairs"] == 4 and not judged["judged"] and told == "Nobody judged a pair yet." and not path.exists()

    orders = []
    for judge, better in (("Zoë", True), ("ben", False)):
        shown = pairs(server, run, judge.replace("ë", "%C3%AB"))
        assert shown["judge"] == judge and len(shown["pairs"]) == 5
        assert shown["kinds"][1] == ["attribute", "skin tone"] and len(shown["kinds"]) == 7
        red = [[is_red(server, shown, pair, side) for side in ("left", "right")] for pair in shown["pairs"]]
        orders.append(red)
        assert sum(left != right for left, right in red) == 4, "the fifth is one picture twice"
        for place, (left, right) in enumerate(red):
            said = {"judge": f" {judge} ", "pair": place, "better": "neither", "changed": ["nothing"]}
            if left != right:  # Zoë always likes the blue one, ben the red one
                said |= {"better": "left" if left != better else "right", "changed": ["background", "attribute"]}
            assert hand_in(server, run, said) == (200, {"judged": place + 1})
        again = pairs(server, run, judge.replace("ë", "%C3%AB"))["pairs"]
        assert [pair["said"]["better"] for pair in again] == [
            "neither" if left == right else "left" if left != better else "right" for left, right in red
        ]
    assert orders[0] != orders[1]

    found = rows(path)
    assert [row["judge"] for row in found] == ["Zoë"] * 5 + ["ben"] * 5
    assert {(row["first"], row["second"]) for row in found} == {NAMES}
    assert sorted(int(row["pair"]) for row in found[:5]) == [1, 2, 3, 4, 5]
    assert {row["better"] for row in found[:5] if row["equal"] == "no"} == {"second"}
    assert {row["changed"] for row in found if row["equal"] == "no"} == {"attribute background"}
    (caught, _) = [row for row in found if row["equal"] == "yes"]
    assert (caught["pair"], caught["better"], caught["changed"]) == ("5", "neither", "nothing")

    # ben changes his mind on one pair: the last word counts.
    place = next(i for i, (left, right) in enumerate(orders[1]) if left != right)
    side = "right" if orders[1][place][0] else "left"
    assert hand_in(server, run, {"judge": "ben", "pair": place, "better": side, "changed": ["hair"]})[0] == 200
    run, judged, told = graph.run(server)
    assert judged["judged"] == 4 and judged["answers"] == {"Zoë": 4, "ben": 4} and judged["names"] == list(NAMES)
    assert judged["together"]["better"] == {"first": 0, "neither": 0.75, "second": 0.25}
    low, high = wilson_interval(1, 4)
    assert judged["together"]["better_ci"]["second"] == pytest.approx([low, high])
    assert judged["by_judge"]["ben"]["better"] == {"first": 0.75, "neither": 0, "second": 0.25}
    assert judged["agreement"] == 0.25 and judged["looked"]["share"] == 1 and len(rows(path)) == 11
    assert f"{NAMES[1]} in 1, and 3 show no difference" in told


def test_judgements_count_for_the_pictures_that_were_judged(server: Server):
    graph = Pairs(pictures=2, save_as="judged/others")
    run = graph.run(server)[0]
    assert hand_in(server, run, {"judge": "a", "pair": 0, "better": "left", "changed": ["hair"]})[0] == 200
    graph.sides[1].inputs["color"] = 0x00C000
    other, judged, _ = graph.run(server)
    assert judged["judged"] == 0 and other != run
    graph.sides[1].inputs["color"] = 0x0000C0
    assert graph.run(server)[1]["judged"] == 1


GOOD = {"judge": "anna", "pair": 0, "better": "left", "changed": ["hair"]}
BAD = {
    "no JSON": b"{", "deep JSON": b"[" * 4000, "no object": [1], "a field too few": {"judge": "anna"},
    "a field too many": GOOD | {"path": "/etc/passwd"}, "no name": GOOD | {"judge": " "},
    "a formula": GOOD | {"judge": '=HYPERLINK("x")'}, "a name of two lines": GOOD | {"judge": "a\nb,c"},
    "a long name": GOOD | {"judge": "x" * 41}, "a name that is none": GOOD | {"judge": {"a": 1}},
    "a pair that is none": GOOD | {"pair": 4}, "a pair before the first": GOOD | {"pair": -1},
    "half a pair": GOOD | {"pair": 0.5}, "true": GOOD | {"pair": True},
    "a side that is none": GOOD | {"better": "first"},
    "a list of sides": GOOD | {"better": ["left"]}, "no kind": GOOD | {"changed": []},
    "an unknown kind": GOOD | {"changed": ["nose"]}, "nothing and hair": GOOD | {"changed": ["nothing", "hair"]},
    "a text of kinds": GOOD | {"changed": "hair"}, "kinds of kinds": GOOD | {"changed": [["hair"]]},
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_judgement_is_refused_with_a_sentence(server: Server, asked, case: str):
    status, answer = hand_in(server, asked[0], BAD[case])
    assert status == 400 and answer["error"]
    assert not (server.output_dir / "judged" / "refused.csv").exists()


def test_a_judgement_that_is_too_large_is_refused(server: Server, asked):
    status, answer = hand_in(server, asked[0], GOOD | {"judge": "x" * 5000})
    assert status == 413 and "at most 4096 bytes" in answer["error"]


@pytest.mark.parametrize("run", ["0" * 32, "..", "%2e%2e%2f%2e%2e%2fetc", "judged%2Frefused", "x" * 500])
def test_only_runs_of_the_node_can_be_asked_for(server: Server, run: str):
    for body in (None, json.dumps(GOOD).encode()):
        with pytest.raises(urllib.error.HTTPError) as caught:
            server.request(f"/difflens/judging/{run}?judge=anna", body)
        assert caught.value.code in (404, 405)
    server.request("/prompt")  # it lives


def test_a_name_is_needed_to_see_the_pairs(server: Server, asked):
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.request(f"/difflens/judging/{asked[0]}")
    assert caught.value.code == 400 and "the judge's name '' cannot be used" in json.loads(caught.value.read())["error"]


def test_without_an_attribute_nobody_can_say_that_it_changed(server: Server):
    run = Pairs(pictures=1, attribute="", save_as="judged/plain").run(server)[0]
    assert "attribute" not in dict(pairs(server, run, "anna")["kinds"])
    assert hand_in(server, run, GOOD | {"changed": ["attribute"]})[0] == 400
    assert hand_in(server, run, GOOD)[0] == 200


def test_a_file_of_something_else_is_left_alone(server: Server, asked):
    path = server.output_dir / "judged" / "refused.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("month,rent\nMay,800\n")
    status, answer = hand_in(server, asked[0], GOOD)
    assert status == 400 and "refused.csv begins with 'month,rent'" in answer["error"]
    message = refusal(server, asked[1])
    assert "Judge by Eye: refused.csv begins with 'month,rent'" in message
    assert path.read_text() == "month,rent\nMay,800\n"


REFUSED = {
    "a way out of the folder": ({"save_as": "../../escaped"}, "cannot be a file name"),
    "a place of its own": ({"save_as": "/tmp/escaped"}, "cannot be a file name"),
    "no name": ({"save_as": " "}, "cannot be a file name"),
    "one name": ({"names": "before"}, "names has 1 lines"),
    "the same name": ({"names": "a\na"}, "both pictures are called 'a'"),
    "a formula": ({"names": "a\n=b"}, "the name '=b' cannot be used"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_gives_one_clear_sentence(server: Server, case: str):
    settings, phrase = REFUSED[case]
    message = refusal(server, Pairs(pictures=2, **settings))
    assert f"Judge by Eye: {phrase}" in message or phrase in message, message
    assert not list(server.base.parent.rglob("escaped*"))


def test_pictures_that_do_not_go_together_are_refused(server: Server):
    graph = Pairs(pictures=2)
    graph.judge.inputs["second"] = graph.add("EmptyImage", width=32, height=64, batch_size=3, color=0)[0]
    assert "first holds 2 pictures of 64 x 64, second 3 pictures of 32 x 64" in refusal(server, graph)
