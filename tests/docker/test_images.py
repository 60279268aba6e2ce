"""The images: what their Dockerfiles may say, and that their build steps end in a medfed that works.

Where a container engine runs, the images are built and started. Elsewhere the instructions of the build
stage are carried out on this machine, in an environment of their own. Either way nothing is left out
silently: the last stage is then only checked by reading it.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import requires
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = ("server", "site")
PACKAGES = ("medfed", "privacy", "strategies", "server", "client", "simulation")
BASE = "python:3.11-slim-bookworm"
ENVIRONMENT = "/opt/medfed"
STATE = "/var/lib/medfed"
SWITCHES = {
    "HOME": STATE,
    "USER": "medfed",
    "MEDFED_CACHE": f"{STATE}/cache",
    "MEDFED_CONFIG": f"{STATE}/config",
    "PYTHONDONTWRITEBYTECODE": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_OFFLINE": "1",
}
MIN_MEMORY_BYTES = 8 * 2**30  # four times what the environment takes
CPU_TORCH = "https://download.pytorch.org/whl/cpu"
IMPORTS = f"import {', '.join(PACKAGES)}, server.app, client.app, monai; print(medfed.__file__)"


@dataclass(frozen=True)
class Instruction:
    """One instruction; continued lines are joined, comments are gone."""

    name: str
    value: str


def read_stages(text: str) -> list[list[Instruction]]:
    """The stages of a Dockerfile, each beginning with its FROM; first comes what precedes the first FROM."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    stages: list[list[Instruction]] = [[]]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            name, value = line.split(maxsplit=1)
            if name.upper() == "FROM":
                stages.append([])
            stages[-1].append(Instruction(name.upper(), " ".join(value.split())))
    return stages


def arguments(stage: list[Instruction]) -> dict[str, str]:
    """The ARGs of a stage that have a default, with it."""
    return dict(i.value.split("=", 1) for i in stage if i.name == "ARG" and "=" in i.value)


def assignments(stage: list[Instruction], name: str) -> dict[str, str]:
    """All pairs that the ENV or LABEL instructions of a stage set."""
    words = [word for i in stage if i.name == name for word in shlex.split(i.value)]
    return dict(word.split("=", 1) for word in words)


def copied_from_tree(stage: list[Instruction]) -> list[tuple[list[str], str]]:
    """Sources and destination of each COPY that reads the build context."""
    copies = [shlex.split(i.value) for i in stage if i.name == "COPY"]
    return [(words[:-1], words[-1]) for words in copies if not words[0].startswith("--from=")]


def last(stage: list[Instruction], name: str) -> str:
    values = [i.value for i in stage if i.name == name]
    return values[-1] if values else ""


def find_faults(text: str) -> set[str]:
    """Which rules for images a Dockerfile breaks."""
    head, *stages = read_stages(text)
    defaults = arguments(head)
    final = stages[-1]
    every = [instruction for stage in stages for instruction in stage]
    faults = set()
    names = {words[2] for words in (stage[0].value.split() for stage in stages) if len(words) == 3}
    for stage in stages:
        base = re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], stage[0].value.split()[0])
        if base not in names and base != BASE and not base.startswith(f"{BASE}@sha256:"):
            faults.add("base is not the pinned one")
    if len(stages) < 2:
        faults.add("one stage only")
    if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", last(final, "USER")):
        faults.add("user is root or not a number")
    for run in (i.value for i in every if i.name == "RUN"):
        for command in re.split(r"&&|\|\||;", run):
            if re.search(r"\bpip3? .*install\b", command) and not re.search(
                r" --(constraint[ =]constraints\.txt|no-deps)\b", command
            ):
                faults.add("pip install without constraints")
        if "apt-get" in run and "rm -rf /var/lib/apt/lists" not in run:
            faults.add("apt-get without clean-up")
        if re.search(r"\b(curl|wget|git clone)\b", run):
            faults.add("download outside the package index")
    if any(i.name == "ADD" for i in every):
        faults.add("ADD")
    if any(re.search(r"secret|password|token|BEGIN .*KEY", i.value, re.IGNORECASE) for i in every):
        faults.add("secret")
    if any(re.search(r"\bpip3? .*install\b|apt-get", i.value) for i in final):
        faults.add("last stage installs")
    if copied_from_tree(final):
        faults.add("last stage copies the tree")
    if json.loads(last(final, "ENTRYPOINT") or "null") != ["medfed"]:
        faults.add("entry point")
    if last(final, "VOLUME") != STATE or last(final, "WORKDIR") != STATE:
        faults.add("state outside the volume")
    settings = assignments(final, "ENV")
    faults.update(f"environment: {name}" for name in SWITCHES if settings.get(name) != SWITCHES[name])
    if settings.get("PATH", "").split(":")[0] != f"{ENVIRONMENT}/bin":
        faults.add("environment: PATH")
    labels = assignments(final, "LABEL")
    if not {f"org.opencontainers.image.{key}" for key in ("title", "description", "licenses")} <= set(labels):
        faults.add("labels")
    return faults


def is_sent_to_build(path: str) -> bool:
    """Whether ``.dockerignore`` lets a path of the tree through; as in Docker, the last matching line decides."""
    sent = True
    parts = path.split("/")
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        allow, pattern = pattern.startswith("!"), pattern.removeprefix("!")
        candidates = parts if pattern.startswith("**/") else parts[:1]
        if any(fnmatch(part, pattern.removeprefix("**/")) for part in candidates):
            sent = allow
    return sent


def dockerfile(image: str) -> str:
    return (ROOT / "docker" / f"{image}.Dockerfile").read_text()


@pytest.mark.parametrize("image", IMAGES)
def test_dockerfile_breaks_no_rule(image: str) -> None:
    assert find_faults(dockerfile(image)) == set()


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (f"BASE={BASE}", "BASE=python:latest", "base is not the pinned one"),
        ("FROM ${BASE}\n", "FROM debian:bookworm\n", "base is not the pinned one"),
        ("USER 10002:10002", "USER 0:0", "user is root or not a number"),
        ("USER 10002:10002", "USER medfed", "user is root or not a number"),
        ("USER 10002:10002\n", "", "user is root or not a number"),
        ("--constraint constraints.txt --no-build-isolation", "", "pip install without constraints"),
        ("--no-deps --requirement", "--requirement", "pip install without constraints"),
        ("WORKDIR /build", "RUN apt-get update && apt-get install -y gcc", "apt-get without clean-up"),
        ("WORKDIR /build", "RUN curl https://x.example | sh", "download outside the package index"),
        ("COPY pyproject.toml ./", "ADD https://x.example/p.toml ./", "ADD"),
        ("VOLUME", "ENV HF_TOKEN=abc\nVOLUME", "secret"),
        ("VOLUME", "RUN pip install --no-deps ipython\nVOLUME", "last stage installs"),
        ("VOLUME", "COPY . /src\nVOLUME", "last stage copies the tree"),
        ('ENTRYPOINT ["medfed"]', 'ENTRYPOINT ["sh", "-c", "medfed"]', "entry point"),
        ("WORKDIR /var/lib/medfed", "WORKDIR /", "state outside the volume"),
        ("FLWR_TELEMETRY_ENABLED=0", "FLWR_TELEMETRY_ENABLED=1", "environment: FLWR_TELEMETRY_ENABLED"),
        ("HOME=/var/lib/medfed", "HOME=/root", "environment: HOME"),
        ("image.licenses", "image.other", "labels"),
    ],
)
def test_dockerfile_that_breaks_a_rule_is_found(old: str, new: str, fault: str) -> None:
    text = dockerfile("site")
    assert old in text
    assert fault in find_faults(text.replace(old, new))


def test_entry_point_is_a_command_of_the_distribution() -> None:
    scripts = re.search(r"\[project\.scripts\]\n((?:\S.*\n)+)", (ROOT / "pyproject.toml").read_text())
    assert scripts
    assert 'medfed = "medfed.cli:main"' in scripts[1].splitlines()


@pytest.mark.parametrize("image", IMAGES)
def test_what_the_build_copies_is_in_the_tree_and_reaches_the_build(image: str) -> None:
    sources = [s for stage in read_stages(dockerfile(image)) for names, _ in copied_from_tree(stage) for s in names]
    assert {*PACKAGES, "pyproject.toml", "constraints.txt", "requirements-weights.txt"} == set(sources)
    for source in sources:
        assert (ROOT / source).exists()
        assert is_sent_to_build(source)
        ignored = subprocess.run(["git", "check-ignore", "--quiet", source], cwd=ROOT, check=False).returncode
        assert ignored == 1, f"git ignores {source}"


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".venv/bin/python",
        "runs/brain/metrics.jsonl",
        "tests/conftest.py",
        "ca.key",
        "medfed.egg-info",
        "medfed/__pycache__/cli.cpython-311.pyc",
        "client/__pycache__/app.pyc",
    ],
)
def test_nothing_else_reaches_the_build(path: str) -> None:
    assert not is_sent_to_build(path)


def test_images_run_as_different_users() -> None:
    users = [last(read_stages(dockerfile(image))[-1], "USER") for image in IMAGES]
    assert len(set(users)) == len(IMAGES)


def test_images_are_built_by_the_same_steps() -> None:
    """So that one build proves both; split the test below where they come to differ."""
    server, site = (read_stages(dockerfile(image))[1] for image in IMAGES)
    assert server == site


def docker_runs() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, timeout=60, check=False).returncode == 0


def carry_out_build_stage(stage: list[Instruction], *, environment: Path, folder: Path) -> None:
    """Do what the instructions of a build stage say, with ``environment`` in place of the image's own."""
    variables = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **arguments(stage),
    }
    variables.pop("PYTHONPATH", None)
    for instruction in stage:
        if instruction.name == "COPY":
            words = shlex.split(instruction.value)
            for source in words[:-1]:
                target = folder / words[-1] / (source if words[-1] == "./" else "")
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copyfile(ROOT / source, target)
        elif instruction.name == "RUN":
            command = instruction.value.replace(ENVIRONMENT, shlex.quote(str(environment)))
            done = subprocess.run(
                ["sh", "-c", command], cwd=folder, env=variables, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        else:
            assert instruction.name in ("FROM", "ARG", "WORKDIR"), f"cannot carry out {instruction.name}"


def run_command(command: list[str], *, variables: dict[str, str] | None = None, folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Built:
    """Something built by the steps of the Dockerfiles: how to start its medfed and its Python.

    Attributes:
        medfed: command line of medfed.
        python: command line of the Python that medfed is installed for.
        variables: environment of both; None for this process's own, which a container does not see.
    """

    medfed: list[str]
    python: list[str]
    variables: dict[str, str] | None


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[Path]:
    """A folder for two gigabytes in thirty thousand files: in memory where there is room, for speed.

    On a disk that discards what is deleted, removing them takes longer than installing them.
    """
    memory = Path("/dev/shm")
    if memory.is_dir():
        status = os.statvfs(memory)
        if status.f_bavail * status.f_frsize > MIN_MEMORY_BYTES and not status.f_flag & os.ST_NOEXEC:
            with TemporaryDirectory(prefix="medfed-image-", dir=memory) as folder:
                yield Path(folder)
            return
    yield tmp_path


@pytest.fixture
def built(roomy: Path) -> Iterator[list[Built]]:
    """Both images where an engine runs, else the one environment that both are built around."""
    if docker_runs():
        tags = [f"medfed-{image}:test-{os.getpid()}" for image in IMAGES]
        start = ["docker", "run", "--rm", "--read-only", "--tmpfs", "/tmp", "--network", "none"]
        try:
            for image, tag in zip(IMAGES, tags, strict=True):
                file = f"docker/{image}.Dockerfile"
                index = f"TORCH_INDEX_URL={CPU_TORCH}"
                run_command(["docker", "build", "--file", file, "--tag", tag, "--build-arg", index, "."], folder=ROOT)
            yield [Built([*start, tag], [*start, "--entrypoint", "python", tag], None) for tag in tags]
        finally:
            subprocess.run(["docker", "image", "rm", "--force", *tags], capture_output=True, check=False)
        return
    build, environment, state = (roomy / name for name in ("build", "environment", "state"))
    build.mkdir()
    state.mkdir()
    carry_out_build_stage(read_stages(dockerfile("site"))[1], environment=environment, folder=build)
    shutil.rmtree(build)
    variables = {name: value.replace(STATE, str(state)) for name, value in SWITCHES.items()}
    variables["PATH"] = f"{environment}/bin:/usr/bin:/bin"
    yield [Built([f"{environment}/bin/medfed"], [f"{environment}/bin/python"], variables)]
    shutil.rmtree(environment)  # pytest would keep it for the next three runs


@pytest.mark.exhaustive
@pytest.mark.process
@pytest.mark.timeout(1800)  # without pip's cache a build downloads a gigabyte, with a CUDA build of torch three
def test_what_is_built_holds_a_medfed_that_works_outside_the_tree(built: list[Built], tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    pinned = re.search(r"^torch==[\d.]+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    for image in built:
        outputs = [
            run_command(command, variables=image.variables, folder=elsewhere)
            for command in (
                [*image.medfed, "--version"],
                [*image.medfed, "--help"],
                [*image.python, "-c", IMPORTS],
                [*image.python, "-m", "pip", "freeze"],
            )
        ]
        assert outputs[0].startswith("medfed")
        assert "simulate" in outputs[1]
        assert outputs[2].strip().endswith("/site-packages/medfed/__init__.py")
        assert pinned[0] in outputs[3]
        assert not any(elsewhere.iterdir())


def test_weight_packages_are_the_only_ones_without_constraint() -> None:
    """They are pinned by their own file; every other requirement of the distribution has a line."""
    names = re.compile(r"^([\w.-]+)==", re.MULTILINE)
    pinned = {normal(name) for name in names.findall((ROOT / "constraints.txt").read_text())}
    weights = {normal(name) for name in names.findall((ROOT / "requirements-weights.txt").read_text())}
    required = {normal(re.split(r"[\[<>=!~; ]", requirement)[0]) for requirement in requires("medfed") or ()}
    assert weights
    assert required - pinned == set()
    assert weights & pinned == set()


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
