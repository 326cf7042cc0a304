"""The pages for people: short where they should be, their links, commands and names right, no figure told twice."""

from __future__ import annotations

import ast
import importlib
import re
from itertools import combinations
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *DOCS, *sorted(ROOT.glob("models/*/README.md"))]
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?:<([^>]+)>|([^)\s]+))\)")
COMMAND = re.compile(r"python ((?:scripts|benchmarks|models/making)/\w+\.py)((?: +[^\s`]+)*)")
FOLDERS = (
    "difflens_core|nodes|web|locales|workflows|scripts|benchmarks|tests|docs|"
    "models/(?:avatars|prompted_avatars|scenes|making)"
)


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """The page without what stands between fences."""
    return FENCE.sub("", text_of(page))


def links(page: Path) -> list[tuple[Path, str]]:
    """File and heading (or "") that each link or image within the repository leads to."""
    found = [unquote(angled or plain) for angled, plain in LINK.findall(prose(page))]
    parts = [target.partition("#") for target in found if "://" not in target]
    return [((page.parent / path).resolve() if path else page, heading) for path, _, heading in parts]


def headings(page: Path) -> set[str]:
    """Names by which a link reaches the page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_is_short():
    assert len(text_of(README).splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_links_and_pictures_lead_somewhere(page):
    found = links(page)
    assert not [label(path) for path, _ in found if not path.exists()]
    assert not [
        f"{label(path)}#{name}" for path, name in found if name and path.exists() and name not in headings(path)
    ]


def test_pictures_of_the_help_pages_are_there_and_small():
    pictures = [(page, path) for page in sorted((ROOT / "web/docs").glob("*.md")) for path, _ in links(page)]
    missing = [f"{page.name}: {path.name}" for page, path in pictures if not path.exists()]
    assert not missing
    assert not [path.name for path in (ROOT / "web/docs").glob("*.webp") if path.stat().st_size > 30_000]


def test_every_help_page_has_an_example():
    assert not [page.name for page in (ROOT / "web/docs").glob("*.md") if "xample" not in text_of(page)]


def test_every_page_is_found_from_the_readme_and_leads_back():
    reached, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        if page not in reached and page.suffix == ".md" and page.exists():
            reached.add(page)
            waiting += [path for path, _ in links(page)]
    assert DOCS and not [label(page) for page in DOCS if page not in reached]
    assert not [label(page) for page in DOCS if README not in [path for path, _ in links(page)]]
    lonely = [label(page) for page in DOCS if not {path for path, _ in links(page)} & ({*DOCS} - {page})]
    assert not lonely


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_commands_and_their_options_exist(page):
    for script, arguments in COMMAND.findall(text_of(page)):
        assert (ROOT / script).is_file(), script
        source = text_of(ROOT / script)
        assert not [word for word in arguments.split() if word.startswith("--") and word not in source], script


def test_the_pages_name_commands():
    assert len({script for page in PAGES for script, _ in COMMAND.findall(text_of(page))}) > 10


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_files_and_names_of_the_code_exist(page):
    named = re.findall(rf"`((?:{FOLDERS})/[\w./ ]*)`", prose(page))
    assert not [path for path in named if not (ROOT / path).exists()]
    for module, name in re.findall(r"\b(difflens_core\.\w+)\.(\w+)", text_of(page)):
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
    for module, names in re.findall(r"^from (difflens_core[\w.]*) import (.+)$", text_of(page), re.MULTILINE):
        missing = [name for name in names.split(", ") if not hasattr(importlib.import_module(module), name)]
        assert not missing


def nodes() -> dict[str, tuple[str, str]]:
    """Id and display name of every node class in the list that ComfyUI is given, by class name."""
    tree = ast.parse(text_of(ROOT / "nodes/__init__.py"))
    (listed,) = [statement.value for statement in tree.body if isinstance(statement, ast.AnnAssign)]
    classes = {
        definition.name: definition
        for path in (ROOT / "nodes").glob("*.py")
        for definition in ast.parse(text_of(path)).body
        if isinstance(definition, ast.ClassDef)
    }
    found = {}
    for name in (item.id for item in listed.elts):
        (schema,) = [
            {keyword.arg: keyword.value for keyword in call.keywords}
            for call in ast.walk(classes[name])
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "io.Schema"
        ]
        found[name] = (schema["node_id"].value, schema["display_name"].value)
    return found


def test_every_node_has_a_help_page_and_a_line_in_the_list():
    found = nodes()
    assert len(found) >= 25
    assert {f"{node_id}.md" for node_id, _ in found.values()} == {path.name for path in ROOT.glob("web/docs/*.md")}
    lines = re.findall(r"^\| \[(.+?)\]\(\.\./web/docs/(\w+)\.md\) \|", text_of(ROOT / "docs/nodes.md"), re.MULTILINE)
    assert sorted(lines) == sorted((name, node_id) for node_id, name in found.values())


@pytest.mark.parametrize("node_id, name", nodes().values(), ids=lambda value: value)
def test_a_help_page_has_the_nodes_name(node_id, name):
    title = text_of(ROOT / f"web/docs/{node_id}.md").splitlines()[0]
    assert title == f"# {name}"


def test_every_workflow_is_in_the_readme():
    named = re.findall(r"^\| `(\d\d [^`]+)` \|", text_of(README), re.MULTILINE)
    assert named == sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))


# --- figures ---


def tables(page: Path) -> list[set[str]]:
    """Rows with figures (two decimals or more) of each table of a page, in fences or between bars."""
    text = text_of(page)
    found = FENCE.findall(text) + re.findall(r"(?:^\|.*\n)+", FENCE.sub("", text), re.MULTILINE)
    rows = [{" ".join(row.split()) for row in table.splitlines()} for table in found]
    return [{row for row in table if len(re.findall(r"\d*\.\d+", row)) >= 2} for table in rows]


def exact_figures(page: Path) -> set[str]:
    """Decimals with three digits behind the point."""
    return set(re.findall(r"(?<![\d.])\d?\.\d{3}(?!\d)", text_of(page)))


def test_no_row_of_figures_stands_in_two_tables():
    found = [table for page in PAGES for table in tables(page) if table]
    assert len(found) > 10
    assert not [twice for a, b in combinations(found, 2) if (twice := a & b)]


def test_exact_figures_are_in_the_docs_alone():
    assert sum(len(exact_figures(page)) for page in DOCS) > 100
    assert not exact_figures(README) & set().union(*map(exact_figures, DOCS))


def figures(title: str) -> dict[str, list[list[float]]]:
    """Rows of the first table below a heading of docs/results.md: numbers by name, the interval's ends left out."""
    section = text_of(ROOT / "docs/results.md").split(f"\n## {title}\n")[1]
    found: dict[str, list[list[float]]] = {}
    for row in re.findall(r"^ *(?:before|SAE recipe) .*$", FENCE.search(section)[0], re.MULTILINE):
        name = row[: row.index("0")].strip()
        numbers = re.findall(r"\d+\.\d+", re.sub(r"\[.*?\]", "", row))
        found.setdefault(name, []).append([float(number) for number in numbers])
    return found


def test_the_sentences_of_the_readme_follow_from_the_tables():
    readme = " ".join(text_of(README).split())
    alone, prompted = figures("Portraits without a prompt"), figures("By prompt")
    assert len(alone["SAE recipe"]) == 3 and len(prompted["SAE recipe"]) == 8
    # A row: FD, FD of counts, success (not before), kept ..., change.
    start, end, success, kept = re.search(
        r"an FD of ([\d.]+) or more and ends at ([\d.]+) or less. Success is at least (\d+) %. .*? in at least (\d+) %",
        readme,
    ).groups()
    assert min(row[0] for row in alone["before"]) >= float(start)
    assert max(row[0] for row in alone["SAE recipe"]) <= float(end)
    assert 100 * min(row[2] for row in alone["SAE recipe"]) >= float(success)
    others = [row[3:-1] for row in alone["SAE recipe"]]  # presentation's, age's, skin tone's
    del others[1][2]  # seniors are grey
    assert min(map(min, others)) >= float(kept)
    start, end, success, tone, hair = re.search(
        r"FD starts at ([\d.]+) or more and ends below ([\d.]+), and success is at least (\d+) %. All pictures keep "
        r".*?; (\d+) % keep their skin tone. .*? (\d+) % of the firefighters keep it",
        readme,
    ).groups()
    assert min(row[0] for row in prompted["before"]) >= float(start)
    assert max(row[0] for row in prompted["SAE recipe"]) < float(end)
    assert 100 * min(row[2] for row in prompted["SAE recipe"]) >= float(success)
    # Occupation, age or presentation, skin tone, hair colour, background.
    kept = [[min(row[3 + i] for row in prompted["SAE recipe"][first::2]) for i in range(5)] for first in (0, 1)]
    assert all(own[0] == own[1] == own[4] == 100 and own[2] >= float(tone) for own in kept)
    assert round(kept[0][3]) == round(prompted["SAE recipe"][4][6]) == int(hair)  # senior hair is grey: not by age
