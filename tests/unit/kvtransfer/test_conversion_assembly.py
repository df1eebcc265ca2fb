from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.assembly import Assembly

SIZES = st.integers(1, 9)


@given(
    st.lists(SIZES, min_size=1, max_size=3),
    SIZES,
    st.integers(0, 5),
    st.integers(0, 40),
    st.randoms(use_true_random=False),
    st.integers(0, 99),
)
def test_a_block_is_whole_when_every_source_has_brought_its_tokens(
    sources, sink, first, count, order, lost
):
    tokens = range(first * sink, first * sink + count)
    assembly = Assembly(sources, sink, tokens)
    assert len(assembly.blocks) == -(-count // sink)
    landings = [(c, b) for c in range(len(sources)) for b in assembly.source_blocks(c)]
    order.shuffle(landings)
    wrong, landings = landings[: lost % 3], landings[lost % 3 :]
    brought = [set() for _ in sources]
    told = []
    for contribution, block in landings:
        told += assembly.landed(contribution, block)
        size = sources[contribution]
        brought[contribution].update(range(block * size, (block + 1) * size))
        for i, number in enumerate(assembly.blocks):
            needs = set(range(number * sink, (number + 1) * sink)) & set(tokens)
            assert assembly.complete[i] == all(needs <= has for has in brought)
    whole = [n for n, done in zip(assembly.blocks, assembly.complete, strict=True) if done]
    assert sorted(told) == whole
    for contribution, block in wrong:
        assembly.failed(contribution, block)
    assert assembly.corrupt == len(assembly.blocks) - len(whole)
