"""What the site takes from the code: `measures`, a directive for tables of DEFINITIONS, and signatures of modules."""

import inspect
import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.inspect import stringify_signature

from oasis_jax.evaluation import DEFAULT, EVALUATORS

COLUMNS = {"tensor": "is read of", "average": "how it is reduced", "source": "who defined it"}


class Measures(SphinxDirective):
    """Every family: a section with a table of its values."""

    def run(self) -> list[nodes.Node]:
        return [self._family(name) for name in EVALUATORS]

    def _family(self, name: str) -> nodes.section:
        section = nodes.section(ids=[f"measures-{name.replace('_', '-')}"], names=[name])
        section += nodes.title(text=name)
        if name in DEFAULT:
            section += nodes.paragraph(text="Part of the default set.")
        table = nodes.table(classes=["measures"])
        group = nodes.tgroup(cols=2)
        group += [nodes.colspec(colwidth=20), nodes.colspec(colwidth=80)]
        body = nodes.tbody()
        for value, definition in EVALUATORS[name].definitions.items():
            row, cell = nodes.row(), nodes.entry()
            row += nodes.entry("", nodes.paragraph("", "", nodes.literal(text=value)))
            for key, text in definition.items():
                line = nodes.paragraph()
                line += [nodes.emphasis(text=f"{COLUMNS.get(key, 'only for')}: "), nodes.Text(str(text))]
                cell += line
            row += cell
            body += row
        group += body
        table += group
        section += table
        return section


def signature(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, arguments: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Arrays by their short name; the arguments of a class whose metaclass takes any, as those of Flax do: its own."""
    if what == "class" and arguments in ("(*args, **kwargs)", "(*args: Any, **kwargs: Any)"):
        own = inspect.signature(thing.__init__)
        own = own.replace(parameters=list(own.parameters.values())[1:], return_annotation=inspect.Signature.empty)
        arguments = stringify_signature(own, unqualified_typehints=True)
    return tuple(text and re.sub(r"\bjax[\w.]*\.Array\b", "Array", text) for text in (arguments, returns))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("measures", Measures)
    app.connect("autodoc-process-signature", signature)
    return {"parallel_read_safe": True}
