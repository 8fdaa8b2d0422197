"""Three hundred snapshots in a row: as a diary of a long piece of work has them.

Some of them; all with ``WORKBENCH_TEST_POINTS=all make test ARGS=tests/history/test_many.py``.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.history.test_snapshot import Live
from workbench.workbench import Workbench

COUNT = 300 if os.environ.get("WORKBENCH_TEST_POINTS") == "all" else 40 if os.geteuid() == 0 else 20
WRITER = """
mkdir -p /opt/diary
while read -r line; do
    echo "$line" > "/opt/diary/$line"
    echo "$line" > /opt/last
    echo "$line"
done
"""


def shown(workbench: Workbench, image: str) -> tuple[list[int], int]:
    """The pages that a new container of an image has, and what it has last."""
    script = "read -r _; printf [[; ls /opt/diary | sort -n | paste -sd,; printf ],; cat /opt/last; printf ]"
    fresh = Live(workbench, image, argv=["/bin/sh", "-c", f"{{ {script}; }} | tr -d '\\n'; echo; cat > /dev/null"])
    try:
        pages, last = fresh.ask()
        return pages, last
    finally:
        fresh.close()


def test_in_a_row(workbench: Workbench, elsewhere: Workbench, image: str, cli, tmp_path: Path) -> None:
    live = Live(workbench, image, argv=["/bin/sh", "-c", WRITER])
    try:
        layers = len(workbench.image(image).diff_ids)
        ids, paused = [image], []
        for number in range(COUNT):
            live.into.write(f"{number}\n")
            live.into.flush()
            assert live.out.readline() == f"{number}\n"
            taken = live.snapshot(f"Page {number}", name="diary")
            assert taken.image is not None and taken.image.parent == ids[-1]
            assert len(taken.image.diff_ids) == layers + number + 1
            # a page, the last one, and the folders that lead there: nothing of the days before
            assert {path for path in taken.paths if number} <= {f"opt/diary/{number}", "opt/last", "opt/diary", "opt"}
            ids.append(taken.image.id)
            paused.append(taken.paused)
        assert workbench.image("diary").id == ids[-1]
        for back in (0, 1, COUNT // 2, COUNT - 1, COUNT):
            assert workbench.image(f"diary~{back}").id == ids[COUNT - back]
        assert [entry.id for entry in workbench.history("diary")] == [*reversed(ids)]
        said = cli("log", "--oneline", "diary").out.splitlines()
        assert len(said) == COUNT + 1 and said[0].endswith(f"(diary) Page {COUNT - 1}")
        assert shown(workbench, ids[-1]) == ([*range(COUNT)], COUNT - 1)
        assert shown(workbench, "diary~7") == ([*range(COUNT - 7)], COUNT - 8)
        found = workbench.diff(f"diary~{COUNT - 1}", "diary")
        added = {row.path for row in found.files if row.kind == "A"}
        assert added == {f"opt/diary/{number}" for number in range(1, COUNT)}
        assert {row.path for row in found.files if row.kind == "M" and not row.path.endswith("/")} == {"opt/last"}

        out = tmp_path / "diary.tar"
        workbench.export("diary", str(out))
        _, there, _ = elsewhere.load(str(out))
        assert there.id == ids[-1] and elsewhere.check() == []
        assert [entry.id for entry in elsewhere.history("diary")] == [*reversed(ids)]
        assert shown(elsewhere, "diary") == ([*range(COUNT)], COUNT - 1)

        workbench.gc()
        assert workbench.check() == [] and workbench.image(f"diary~{COUNT}").id == image
        print(f"{COUNT} snapshots; stood still for {max(paused) * 1e3:.1f} ms at most")
    finally:
        live.close()
    workbench.refs.delete("diary")
    assert workbench.gc()["layers"] == COUNT and workbench.check() == []
