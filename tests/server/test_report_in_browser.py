"""The report in a real browser: nothing sticks out, nothing is fetched, light and dark and on paper."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from medfed.study import StudyConfig
from server.evaluation import (
    EVALUATION,
    Flips,
    Forgetting,
    Measured,
    Skill,
    UntrainedStructure,
    read_evaluation,
)
from server.report import write_report
from simulation.harness import simulate

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

pytestmark = [
    pytest.mark.process,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


class Browser:
    """A headless Chromium, spoken to by its DevTools protocol over two pipes: no port is opened."""

    def __init__(self, profile: Path) -> None:
        (to_read, self._to), (self._from, to_write) = os.pipe(), os.pipe()
        # Chromium reads at 3 and writes at 4; the shell puts them there, from numbers that are neither.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 30) for end in (to_read, to_write)]
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        quiet = ["--disable-background-networking", "--disable-component-update", "--no-first-run", "--disable-sync"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{ends[0]} 4>&{ends[1]}', str(CHROMIUM), *options, *quiet,
             "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"],
            pass_fds=ends, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for end in (to_read, to_write, *ends):
            os.close(end)
        self._buffer, self._number, self.requests = b"", 0, list[str]()
        target = self._ask("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = self._ask("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> Any:
        return self._ask(method, parameters, self._session)

    def value(self, expression: str) -> Any:
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def _ask(self, method: str, parameters: dict[str, Any], session: str | None = None) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        os.write(self._to, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                received = os.read(self._from, 65536)
                assert received, "the browser has ended"
                self._buffer += received
            text, self._buffer = self._buffer.split(b"\0", 1)
            answer = json.loads(text)
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    started = Browser(tmp_path / "profile")
    try:
        yield started
    finally:
        started.close()


STICKING_OUT = """
Array.from(document.querySelectorAll('body *'))
  .filter(e => !e.closest('svg') && !e.closest('details') && (!e.closest('.wide') || INSIDE_WIDE))
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .map(e => e.tagName + ' ' + e.textContent.slice(0, 40))
"""
TEXT_OUTSIDE_DRAWING = """
Array.from(document.querySelectorAll('svg text')).filter(t => {
  const own = t.getBoundingClientRect(), all = t.closest('svg').getBoundingClientRect();
  return own.left < all.left - 2 || own.right > all.right + 2 || own.bottom > all.bottom + 2;
}).map(t => t.textContent)
"""


def _claim_forgetting(folder: Path) -> None:
    """Let the run have tried structures that it did not train, which its own data does not outline."""
    evaluation = read_evaluation(folder)
    assert evaluation is not None
    measured = Measured(value=-0.123, low=-0.234, high=-0.012)
    skill = {"before": measured, "after": measured, "change": measured}
    structures = {
        f"hippocampus-{side}": UntrainedStructure(**skill, cases=12, other_side=side == "right")
        for side in ("left", "middle", "right")
    }
    forgetting = Forgetting(
        patients=12,
        flips=Flips(cases=36, lost=3, gained=0),
        structures=structures,
        other_sides=Skill(**skill),
        neither_side=Skill(**skill),
    )
    changed = evaluation.model_copy(update={"forgetting": forgetting})
    (folder / EVALUATION).write_text(changed.model_dump_json())
    assert "Did it forget" in write_report(folder).read_text()


def test_report_fits_every_page_and_asks_nobody(
    make_study: Callable[..., StudyConfig],
    study_file: Callable[[StudyConfig], Path],
    tmp_path: Path,
    browser: Browser,
) -> None:
    run = simulate(study_file(make_study()), out=tmp_path / "runs", workers=0, few_shot=[1])
    _claim_forgetting(run.folder)
    page = (run.folder / "report.html").as_uri()
    grounds = {}
    for width, scheme in ((1000, "light"), (1000, "dark"), (390, "light")):
        browser.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        browser.ask("Page.navigate", url=page)
        while browser.value("document.readyState") != "complete" or browser.value("location.href") != page:
            pass
        assert browser.value("document.querySelectorAll('svg').length") >= 3
        inside = "true" if width == 1000 else "false"  # on a telephone a table may be scrolled inside of its box
        assert browser.value(STICKING_OUT.replace("INSIDE_WIDE", inside)) == []
        assert browser.value(TEXT_OUTSIDE_DRAWING) == []
        colours = [
            browser.value(f"getComputedStyle({where}).{what}")
            for where, what in (
                ("document.body", "backgroundColor"),
                ("document.body", "color"),
                ("document.querySelector('svg')", "color"),
            )
        ]
        grounds[width, scheme] = colours
        assert colours[1] == colours[2]  # what is drawn has the colour of the text
    assert grounds[1000, "light"] == grounds[390, "light"]
    assert grounds[1000, "light"][0] == "rgb(255, 255, 255)"
    assert grounds[1000, "dark"][0] == "rgb(20, 23, 26)"
    pdf = base64.b64decode(browser.ask("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"])
    assert pdf.startswith(b"%PDF")
    assert {url for url in browser.requests if not url.startswith("data:")} == {page}
