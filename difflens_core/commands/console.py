"""What a command says as it goes: sentences, a progress bar, and at the end figures for people or for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

OnProgress = Callable[..., None]


@dataclass(frozen=True)
class Console:
    """as_json: figures go out as JSON, and nothing else does; leads: whether this process of several may speak."""

    as_json: bool = False
    leads: bool = True

    def say(self, text: str) -> None:
        """A sentence or a table for whoever watches."""
        if self.leads:
            tqdm.write(text, file=sys.stderr if self.as_json else sys.stdout)

    @contextmanager
    def progress(self, total: int, unit: str) -> Iterator[OnProgress]:
        """A function that takes how much of `total` is done, and what to say beside the bar."""
        with tqdm(total=total, unit=f" {unit}", disable=not self.leads, dynamic_ncols=True) as bar:

            def tell(done: int, beside: str = "") -> None:
                if beside:
                    bar.set_postfix_str(beside, refresh=False)
                bar.update(done - bar.n)

            yield tell

    def figures(self, found: dict[str, Any]) -> None:
        """What a command found, for programs; people were told before."""
        if self.as_json and self.leads:
            print(json.dumps(found, indent=1, default=list))
