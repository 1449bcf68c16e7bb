"""The residual graph: counts of published models, names, and refusals."""

import pytest

from tljax.circuits import ResidualGraph
from tljax.errors import InputError


@pytest.mark.parametrize(
    ("layers", "heads", "parallel", "counts"),
    [
        (12, 12, False, (157, 445, 32_491)),
        (24, 16, False, (409, 1_177, 231_877)),
        (48, 25, False, (1_249, 3_649, 2_235_025)),
        (6, 8, True, (55, 151, 3_580)),
        (12, 12, True, (157, 445, 32_347)),
        (24, 14, False, (361, 1_033, 179_749)),
        (26, 8, False, (235, 651, 74_218)),
        (32, 32, False, (1_057, 3_105, 1_592_881)),
    ],
)
def test_counts_of_published_models(layers: int, heads: int, parallel: bool, counts: tuple[int, int, int]) -> None:
    graph = ResidualGraph(layers, heads, heads, 64, parallel_attn_mlp=parallel)
    assert (graph.n_writers, graph.n_readers, graph.n_edges) == counts


def test_names_lead_back_to_numbers() -> None:
    graph = ResidualGraph(2, 4, 2, 8)
    names = graph.names(graph.edges)
    assert len(set(names)) == graph.n_edges
    assert (graph.mask(names) == graph.edges).all()
    assert graph.reader("a1.kv1<v>") == graph.readers_of(1, "v").stop - 1
    assert [writer.name for writer in graph.writers][graph.writers_of(1)] == ["a1.h0", "a1.h1", "a1.h2", "a1.h3", "m1"]


@pytest.mark.parametrize("name", ["input-m0", "a1.h0->m0", "a0.h9->m0", "m0->a0.h0<q>", "input->m7"])
def test_what_is_no_edge_is_refused(name: str) -> None:
    with pytest.raises(InputError):
        ResidualGraph(2, 4, 2, 8).edge(name)
