"""The page about your own text: its commands work as written in a fresh checkout."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_five_commands_work_in_a_folder_with_only_the_recipes(tmp_path):
    block = re.search(r"```bash\n(.*?)```", (ROOT / "docs/your_data.md").read_text(), re.DOTALL)[1]
    commands = block.strip().splitlines()
    assert len(commands) == 5
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    paths = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"PYTHONPATH": paths, "XDG_STATE_HOME": str(tmp_path / "state")}
    for command in commands:
        command = re.sub(r"^moejax ", f"{sys.executable} -m moejax ", command)
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, (command, done.stderr)
    assert (tmp_path / "runs/own_text/report.html").exists()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"configs", "my_texts", "runs", "data", "state"}
