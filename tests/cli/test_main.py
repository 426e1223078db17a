"""The ways to start ``far`` beside the command itself."""

import runpy

import pytest

import far


@pytest.mark.parametrize("module", ["far", "far.cli"])
def test_as_a_module(module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["far", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert not ended.value.code
    assert capsys.readouterr().out == f"far {far.__version__}\n"
