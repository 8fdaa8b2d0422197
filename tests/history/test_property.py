"""Whatever is done to a tree: its snapshots, laid over what was there before, are the tree, in every attribute."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from workbench.linux import userns

#: ``WORKBENCH_TEST_POINTS=all make test ARGS=tests/history/test_property.py`` tries more of them.
EXAMPLES = 1500 if os.environ.get("WORKBENCH_TEST_POINTS") == "all" else 40

# Few names, so that operations meet.
NAMES = st.sampled_from(["a", "b", "new\nline\udcff"])
PATHS = st.lists(NAMES, min_size=1, max_size=2).map("/".join)
THERE = st.integers(0, 11)
OPERATIONS = st.one_of(
    st.tuples(st.just("write"), PATHS, st.sampled_from([0, 1, 511, 512, 513, 70_000])),
    st.tuples(st.just("folder"), PATHS),
    st.tuples(st.just("sparse"), PATHS, st.sampled_from([4096, 1 << 20])),
    st.tuples(st.sampled_from(["symlink", "fifo"]), PATHS, PATHS),
    st.tuples(st.just("rename"), THERE, PATHS),
    st.tuples(st.just("link"), THERE, PATHS),
    st.tuples(st.sampled_from(["remove", "anew"]), THERE),
    st.tuples(st.sampled_from(["append", "unnoticed"]), THERE),
    st.tuples(st.just("mode"), THERE, st.sampled_from([0o600, 0o755, 0o4711, 0o2755, 0o1777])),
    st.tuples(st.just("owner"), THERE, st.sampled_from([0, 1, 1000])),
    st.tuples(st.just("attribute"), THERE, st.sampled_from(["user.note", "user.overlay.opaque"])),
    st.tuples(st.just("time"), THERE, st.integers(0, (1 << 60) - 1)),
)
ROUNDS = st.lists(st.lists(OPERATIONS, min_size=2, max_size=16), min_size=1, max_size=3)

#: What the first container has to begin with: where there is nothing little can be done.
START = [("folder", "a"), ("folder", "b"), *(("write", path, 9) for path in ("a/a", "a/b", "b/a", "c"))]

_numbers = itertools.count()


@settings(
    max_examples=EXAMPLES, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(containers=st.lists(ROUNDS, min_size=1, max_size=2))
@example([[[("link", 2, "d")]]])  # a second name for c
@example([[[("remove", 2)]]])  # c itself
@example([[[("mode", 2, 0o600)]], [[("anew", 0)]]])  # the folder a of another container
def test_its_snapshots_are_the_tree(tmp_path: Path, containers: list[list[list[tuple[object, ...]]]]) -> None:
    folder = tmp_path / str(next(_numbers))
    folder.mkdir()
    found = userns.call(
        "tests.history.overlays:histories", str(folder), [[START, *containers[0]], *containers[1:]], apart=True
    )
    try:
        assert found == [[], *([] for rounds in containers for _ in rounds)]
    finally:
        userns.call("workbench.linux.trees:remove", str(folder))
