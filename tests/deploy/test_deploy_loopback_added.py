"""Real processes: a node is added while a run is in progress, and takes part in it, because the plan has its number."""

from pathlib import Path

import pytest
from loopback import Loopback, wait_until
from test_deploy_loopback import CONFIG

from fedpriv.deploy.setup.membership import join_nodes
from fedpriv.deploy.status.view import view_of
from fedpriv.experiment.run_directory import RunDirectory

pytestmark = pytest.mark.xdist_group("loopback")


@pytest.mark.slow
def test_a_node_that_is_added_during_a_run_takes_part_in_it(tmp_path: Path) -> None:
    made = Loopback(tmp_path / "d", nodes=2)
    made.make()
    config, out = tmp_path / "devices.toml", tmp_path / "out"
    text = CONFIG.format(rounds=40).replace("clients = 2", "clients = 3")
    config.write_text(text + 'absent = "leave-out"\n')
    try:
        made.start_all()
        run = made.run(config, out, "--test-seeded")
        wait_until(lambda: len(RunDirectory(out).rows("participation.jsonl")) > 0, 240.0, made.log("server"))
        before = {path: path.read_bytes() for i in range(2) for path in (made.folder / f"node-{i}").glob("*.*")}
        lines, faults = join_nodes(made.folder, 1)
        assert faults == []
        assert "registered  node-2" in lines
        assert any("node-2: at once in devices" in line for line in lines)
        assert all(path.read_bytes() == content for path, content in before.items() if path.suffix != ".log")
        made.start("node-2")

        def counted() -> bool:
            return any(2 in row["counted"] for row in RunDirectory(out).rows("participation.jsonl"))

        wait_until(counted, 240.0, made.log("node-2"))
        view = view_of(made.folder)
        assert view.server.startswith("running at 127.0.0.1:")
        assert [node.state for node in view.nodes] == ["online"] * 3
        assert [one.state for one in view.runs] == ["running"]
        run.kill()
        run.communicate()
        made.kill("server")
        wait_until(lambda: [one.state for one in view_of(made.folder).runs] == ["stopped"], 60.0)
        assert view_of(made.folder).server.startswith("stopped, or not reachable")
    finally:
        made.close()
