"""A directive of the site: `measures` is the table of one family of measures, or of all, as the code's DEFINITIONS
have it.
"""

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

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


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("measures", Measures)
    return {"parallel_read_safe": True}
