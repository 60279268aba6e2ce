"""``medfed site health``: served or not, and nothing changes by asking."""

from collections.abc import Callable

import pytest

from client.site_lock import is_served, only_process
from medfed.cli import main


def test_site_is_healthy_while_a_process_holds_it(
    make_consortium: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_consortium("north").sites["north"]
    assert not is_served(folder.root)
    assert not (folder.state / "lock").exists()
    with only_process(folder.root):
        assert is_served(folder.root)
        main(["site", "health", str(folder.root)])
        assert "served" in capsys.readouterr().out
    assert not is_served(folder.root)
    with pytest.raises(SystemExit) as ended:
        main(["site", "health", str(folder.root)])
    assert ended.value.code == 11
    assert "start it with 'medfed site start'" in capsys.readouterr().err
