"""Short names in docstrings, ``:class:`ConfigError```, lead to the one documented object of that name."""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.domains.python import PythonDomain
from sphinx.environment import BuildEnvironment


def find(app: Sphinx, env: BuildEnvironment, node: nodes.Element, content: nodes.Element) -> nodes.Element | None:
    """A reference to the only object whose name ends in the target's last part, if there is one."""
    if node.get("refdomain") != "py":
        return None
    domain = env.domains.python_domain
    assert isinstance(domain, PythonDomain)
    last = node["reftarget"].rpartition(".")[2]
    found = {entry.node_id: entry for name, entry in domain.objects.items() if name.rpartition(".")[2] == last}
    if len(found) != 1:
        return None
    (entry,) = found.values()
    builder = app.builder
    uri = builder.get_relative_uri(node.get("refdoc", entry.docname), entry.docname)
    return nodes.reference("", "", content, internal=True, refuri=f"{uri}#{entry.node_id}")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("missing-reference", find)
    return {"parallel_read_safe": True}
