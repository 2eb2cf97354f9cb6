"""What the documents point to exists: links, anchors, files, modules, commands, settings, and names in the code."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT

from dsrl_async.bench.command import BENCHMARKS
from dsrl_async.config.load import leaf_fields

DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for path in (*map(ROOT.joinpath, ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *ROOT.glob("docs/**/*.md"))
)
TOP = ("configs", "docs", "dsrl_async", "scripts", "tests")
"""A path in backticks that begins with one of these is one of the repository."""
PACKAGE = ROOT / "dsrl_async"
ROOMS = tuple(path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").is_file())
"""A path in backticks that begins with one of these is one of the package."""

FENCE = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
MODULE = re.compile(r"python -m (dsrl_async[\w.]*)(?: ([a-z_]+))?")
SCRIPT = re.compile(r"(?:python|bash|source) ((?:scripts|tests)/[\w/.-]+)")
NAMED_IN = re.compile(r"`([A-Za-z_][\w.]*)`(?: and `([A-Za-z_][\w.]*)`)? in `([\w/]+\.py)`")
SECTIONS = sorted({key.split(".")[0] for key, _ in leaf_fields() if "." in key})
SETTING = re.compile(rf"(?:--)?((?:{'|'.join(SECTIONS)})\.[a-z_-]+)")


def prose(text: str) -> str:
    """A document without its fenced blocks of code."""
    return FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    found: Counter[str] = Counter()
    slugs = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", prose(text), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")
        slugs.add(f"{slug}-{found[slug]}" if found[slug] else slug)
        found[slug] += 1
    return slugs


def links(text: str) -> list[str]:
    """The targets of a document's links and pictures, except those on the web."""
    return [target for target in LINK.findall(prose(text)) if "://" not in target and not target.startswith("mailto:")]


def broken_links(document: Path) -> Iterator[str]:
    """What the links of a document, given by its absolute path, point to in vain."""
    for target in links(document.read_text()):
        file, _, anchor = target.partition("#")
        path = document.parent / file if file else document
        if not path.exists():
            yield f"{target}: there is no such file"
        elif anchor and anchor not in anchors(path.read_text()):
            yield f"{target}: there is no such heading"


def missing_paths(text: str) -> Iterator[str]:
    """Paths in backticks, and scripts in commands, that are not in the repository."""
    for code in CODE.findall(prose(text)):
        path = code.split()[0].rstrip("/") if code.split() else ""
        named = "/" in path and not re.search(r"[<>*{}|$]", path) and path.split("/")[0] in (*TOP, *ROOMS)
        if named and not (ROOT / path).exists() and not (PACKAGE / path).exists():
            yield path
    yield from (path for path in SCRIPT.findall(text) if not (ROOT / path).exists())


def missing_modules(text: str) -> Iterator[str]:
    """Modules of commands that cannot be run, and benchmarks that there are not."""
    for module, word in MODULE.findall(text):
        name = module.rstrip(".")
        if (
            not (ROOT / Path(*name.split("."))).with_suffix(".py").is_file()
            and not (ROOT / Path(*name.split(".")) / "__main__.py").is_file()
        ):
            yield name
        if name == "dsrl_async.bench" and word and word not in BENCHMARKS:
            yield f"{name} {word}"


def missing_names(text: str) -> Iterator[str]:
    """Names that are said to be in a file of the package and are not defined there: "`Lane.advance` in `run/...py`"."""
    for *names, file in NAMED_IN.findall(" ".join(prose(text).split())):
        path = next((base / file for base in (ROOT, PACKAGE) if (base / file).is_file()), None)
        source = path.read_text() if path is not None else ""
        for name in filter(None, names):
            if not defines(source, name.split(".")):
                yield f"{name} in {file}"


def missing_attributes(text: str) -> Iterator[str]:
    """Names in backticks that begin with the package's and are neither modules nor defined in one."""
    for name in re.findall(r"`(dsrl_async(?:\.\w+)+)", prose(text)):
        parts = name.split(".")
        while not (file := module_file(parts)):
            parts.pop()
        if not defines(file.read_text(), name.split(".")[len(parts) :]):
            yield name


def module_file(parts: list[str]) -> Path | None:
    """The file of a module or package, if there is one."""
    path = ROOT.joinpath(*parts)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def defines(source: str, parts: list[str]) -> bool:
    """Whether Python code defines, or a package exports, each of some names."""
    return all(
        re.search(rf"^ *(?:(?:class|def) {part}\b|{part}\b.*? = |\"{part}\",$)", source, re.MULTILINE) for part in parts
    )


def missing_settings(text: str) -> Iterator[str]:
    """Settings in backticks and options in commands that are none of the configuration's."""
    keys = {key for key, _ in leaf_fields()}
    spans = [*CODE.findall(prose(text)), *re.findall(r"--[a-z]+\.[a-z_-]+", text)]
    for code in spans:
        if (match := SETTING.match(code)) and match[1].replace("-", "_") not in keys and not is_module(match[1]):
            yield match[1]


def is_module(name: str) -> bool:
    """Whether what looks like a setting is a module of the package, such as `sac.agent`."""
    return (PACKAGE / Path(*name.split("."))).with_suffix(".py").is_file()


CHECKS = {
    "paths": missing_paths,
    "modules": missing_modules,
    "names": missing_names,
    "attributes": missing_attributes,
    "settings": missing_settings,
}


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_somewhere(document: Path) -> None:
    assert list(broken_links(ROOT / document)) == []


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_what_documents_name_exists(document: Path, check: str) -> None:
    assert list(CHECKS[check]((ROOT / document).read_text())) == []


def test_documents_that_the_code_names_exist() -> None:
    files = [path for top in ("dsrl_async", "scripts", "configs") for path in (ROOT / top).rglob("*.*")]
    texts = {path: path.read_text() for path in files if path.suffix in (".py", ".sh", ".yaml")}
    named = {name: path for path, text in texts.items() for name in re.findall(r"\bdocs/[\w/]+\.\w+", text)}
    assert len(named) > 5
    assert {name: path for name, path in named.items() if not (ROOT / name).exists()} == {}


def test_every_guide_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    pages = [str(path.relative_to("docs")) for path in DOCUMENTS if path.parts[0] == "docs"]
    assert [page for page in pages if f" {page}\n" not in menu] == []


def test_every_picture_is_shown() -> None:
    shown = {target.rpartition("/")[2] for document in DOCUMENTS for target in links((ROOT / document).read_text())}
    pictures = [path for kind in ("svg", "png", "gif") for path in (ROOT / "docs").rglob(f"*.{kind}")]
    assert pictures
    assert [path.name for path in pictures if path.name not in shown] == []


@pytest.mark.parametrize(
    ("mistake", "check"),
    [
        ("see `dsrl_async/throughput_model.py`", "paths"),
        ("see `run/worker/actor.py`", "paths"),
        ("```bash\npython scripts/count_kernels.py\n```", "paths"),
        ("```bash\npython -m dsrl_async.actor --help\n```", "modules"),
        ("run `python -m dsrl_async.bench forked`", "modules"),
        ("`Lane.retreat` in `run/worker/worker.py`", "names"),
        ("`Lane.advance`\nin `run/worker/gone.py`", "names"),
        ("`updates_due` and `decisions_forbidden` in `run/replay_ratio.py`", "names"),
        ("call `dsrl_async.envs.libero.gone()`", "attributes"),
        ("set `sac.gama`", "settings"),
        ("```bash\npython -m dsrl_async.launch --env.chunks 5\n```", "settings"),
    ],
)
def test_a_planted_mistake_is_found(mistake: str, check: str) -> None:
    assert len(list(CHECKS[check](mistake))) == 1


def test_a_planted_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    shutil.copy(ROOT / "docs/design.md", tmp_path / "design.md")
    page.write_text("# A\n[good](design.md#why) [gone](gone.md) [no heading](design.md#because) [own](#b) [fine](#a)\n")
    assert [problem.split(":")[0] for problem in broken_links(page)] == ["gone.md", "design.md#because", "#b"]
