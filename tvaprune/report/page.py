"""The results page: one HTML file that fetches nothing and runs nothing, from titled sections of plain blocks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from jinja2 import Environment, StrictUndefined, Template

from tvaprune.files import write_text
from tvaprune.report.charts import Chart


@dataclass(frozen=True)
class Charts:
    """Charts beside each other, as many in a row as there is room for."""

    kind: ClassVar[str] = "charts"
    charts: tuple[Chart, ...]


@dataclass(frozen=True)
class Table:
    """Rows of cells, the first of each its name; ``numbers`` stand flush right; what is ``folded`` opens at a click."""

    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    numbers: bool = False
    folded: bool = False


@dataclass(frozen=True)
class Code:
    """A text as it is in a file or a terminal."""

    kind: ClassVar[str] = "code"
    title: str
    text: str
    wraps: bool = False


@dataclass(frozen=True)
class Note:
    """A sentence."""

    kind: ClassVar[str] = "note"
    text: str


@dataclass(frozen=True)
class Answer:
    """What a model adds to a prompt: as the first model does, the first token that differs, what follows."""

    name: str
    same: str
    first: str = ""
    rest: str = ""


@dataclass(frozen=True)
class PromptAnswers:
    """What each model adds to one prompt."""

    kind: ClassVar[str] = "answers"
    prompt: str
    answers: tuple[Answer, ...]


Block = Charts | Table | Code | Note | PromptAnswers


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it; one without blocks is left out."""

    title: str
    blocks: Sequence[Block]
    note: str = ""


@dataclass(frozen=True)
class Tile:
    """One figure, large."""

    name: str
    value: str
    beside: str = ""


@dataclass(frozen=True)
class Page:
    """What the page says."""

    title: str
    lead: str
    sections: Sequence[Section]
    tiles: Sequence[Tile] = ()

    def write(self, path: Path) -> None:
        """Writes the page, whole or not at all."""
        filled = Page(self.title, self.lead, [one for one in self.sections if one.blocks], self.tiles)
        write_text(_template().render(page=filled), path)


def charts(found: Iterable[Chart | None]) -> list[Block]:
    """Returns those charts that have something to show, as one block; nothing where none has."""
    shown = tuple(chart for chart in found if chart is not None)
    return [Charts(shown)] if shown else []


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
