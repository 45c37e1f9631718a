"""The import graph: no module imports itself through others. pyproject.toml has the walls for import-linter."""

import grimp


def test_no_module_is_in_a_circle() -> None:
    """For every import, no chain of imports leads back."""
    graph = grimp.build_graph("server", "gpu_worker", "shared")
    circles = [
        chain
        for importer in sorted(graph.modules)
        for imported in graph.find_modules_directly_imported_by(importer)
        if (chain := graph.find_shortest_chain(importer=imported, imported=importer))
    ]
    assert circles == []
