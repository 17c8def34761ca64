"""What is built from the source, and what of it works where there is no compiler."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile

import pytest

pytest.importorskip("setuptools", minversion="77", reason="the package is built with setuptools 77 or newer")
pytest.importorskip("Cython", minversion="3.3", reason="the package is built with Cython 3.3 or newer")

ROOT = pathlib.Path(__file__).parent.parent
DIST = os.environ.get("TAKEOVER_TEST_DIST")
"""A folder with the sdist of this source tree and the wheel built from it, where they have been built already."""
MODULES = {path.stem for path in (ROOT / "ext" / "takeover").glob("*.pyx")}
INTERFACES = {path.name for path in (ROOT / "ext" / "takeover").glob("*.pxd")}
NOT_SOURCE = shutil.ignore_patterns(
    ".git",
    ".venv",
    ".*_cache",
    ".hypothesis",
    "build",
    "dist",
    "__pycache__",
    "*.egg-info",
    "*.so",
    "*.py[cod]",
    "_*.c",
)

needs_a_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler")
pytestmark = pytest.mark.skipif(not MODULES, reason="the source is not beside the tests")


def environment(tmp_path: pathlib.Path, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TAKEOVER_", "PYTHONPATH", "CC"))}
    return {**kept, "TMPDIR": str(tmp_path), **variables}


def without_compiler(tmp_path: pathlib.Path) -> dict[str, str]:
    """An environment whose PATH has nothing at all."""
    empty = tmp_path / "empty"
    empty.mkdir(exist_ok=True)
    return environment(tmp_path, PATH=str(empty))


def build(kind: str, tree: pathlib.Path, out: pathlib.Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Has the build backend make a wheel or an sdist of a source tree with what is installed here."""
    program = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
    return subprocess.run(
        [sys.executable, "-c", program, f"build_{kind}", str(out)],
        cwd=tree,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def built(kind: str, tree: pathlib.Path, out: pathlib.Path, env: dict[str, str]) -> pathlib.Path:
    out.mkdir()
    done = build(kind, tree, out, env)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.iterdir()
    return file


def run(site: pathlib.Path, env: dict[str, str], code: str) -> str:
    """What a program prints that has a folder of packages before the others."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=site,
        env={**env, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def content(wheel: pathlib.Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def install(wheel: pathlib.Path, site: pathlib.Path) -> pathlib.Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The sdist of this source tree; nothing is written into the tree itself."""
    if DIST:
        return next(pathlib.Path(DIST).glob("*.tar.gz"))
    tmp_path = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, tmp_path / "source", ignore=NOT_SOURCE)
    return built("sdist", tmp_path / "source", tmp_path / "out", environment(tmp_path))


@pytest.fixture
def tree(sdist: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A source tree that holds what the sdist does, and nothing else."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (folder,) = (path for path in tmp_path.iterdir() if path.name.startswith("takeover-"))
    return folder


@pytest.fixture(scope="module")
def wheel(sdist: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The compiled wheel, built from the sdist with TAKEOVER_EXT=require."""
    if DIST:
        return next(pathlib.Path(DIST).glob("*.whl"))
    tmp_path = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (folder,) = tmp_path.iterdir()
    return built("wheel", folder, tmp_path / "out", environment(tmp_path, TAKEOVER_EXT="require"))


def test_the_sdist_holds_every_file_of_the_repository(sdist: pathlib.Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout:
        pytest.skip("this is not a git repository")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    assert tracked - held <= {".gitignore"}


def test_the_sdist_holds_nothing_that_was_built(sdist: pathlib.Path) -> None:
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    assert not [name for name in names if name.endswith((".so", ".pyc")) or ("/ext/" in name and name.endswith(".c"))]


@needs_a_compiler
def test_the_compiled_wheel_holds_modules_types_and_interfaces(wheel: pathlib.Path) -> None:
    names = content(wheel)
    compiled = {name.split("/")[1].split(".")[0] for name in names if name.endswith(".so")}
    assert compiled == MODULES
    assert {f"takeover/{name}" for name in INTERFACES} <= names
    assert {"takeover/py.typed", "takeover/__init__.py", "takeover/_fdpass_py.py"} <= names
    assert {f"takeover/{path.name}" for path in (ROOT / "src" / "takeover").glob("*.py*") if path.is_file()} <= names
    assert not [name for name in names if name.endswith((".c", ".pyx")) or name.split("/")[0] in ("ext", "tests")]
    assert not wheel.name.endswith("-any.whl")
    assert [name for name in names if name.endswith("licenses/LICENSE")]


@needs_a_compiler
def test_the_compiled_wheel_runs_compiled(wheel: pathlib.Path, tmp_path: pathlib.Path) -> None:
    site = install(wheel, tmp_path / "site")
    said = run(site, environment(tmp_path), "import takeover; print(takeover.backend, takeover.__file__)")
    assert said == f"cython {site}/takeover/__init__.py"


@needs_a_compiler
def test_others_can_cimport_from_the_wheel(wheel: pathlib.Path, tmp_path: pathlib.Path) -> None:
    site = install(wheel, tmp_path / "site")
    (site / "other.pyx").write_text(
        textwrap.dedent(
            """
            # cython: language_level=3
            cimport takeover._loop
            from takeover._fdpass cimport receive_batch, send_batch

            def there_and_back(int one, int two, int descriptor):
                cdef char letter = 0
                cdef int received, count
                with nogil:
                    send_batch(one, b"x", 1, &descriptor, 1)
                    receive_batch(two, &letter, 1, &received, 1, &count)
                return chr(letter), received, count
            """
        )
    )
    program = """
        from setuptools import Extension, setup
        modules = [Extension("other", ["other.pyx"])]
        setup(name="other", ext_modules=modules, script_args=["-q", "build_ext", "--inplace"])
    """
    run(site, environment(tmp_path), program)
    said = run(
        site,
        environment(tmp_path),
        """
        import os, socket
        import other
        one, two = socket.socketpair()
        letter, received, count = other.there_and_back(one.fileno(), two.fileno(), one.fileno())
        print(letter, count, os.path.sameopenfile(received, one.fileno()), os.get_inheritable(received))
        """,
    )
    assert said == "x 1 True False"


def test_without_a_compiler_the_package_runs_on_plain_python_unless_one_is_required(
    tree: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """One tree for all of it: Cython translates the modules but once."""
    for number, env in enumerate((without_compiler(tmp_path), environment(tmp_path, CC="false"))):
        out = tmp_path / f"out{number}"
        out.mkdir()
        done = build("wheel", tree, out, env)
        assert done.returncode == 0, done.stderr
        for module in MODULES:
            assert f'building extension "takeover.{module}" failed' in done.stdout + done.stderr
        (wheel,) = out.iterdir()
        assert not [name for name in content(wheel) if name.endswith(".so")]
        site = install(wheel, tmp_path / f"site{number}")
        assert run(site, env, "import takeover; print(takeover.backend)") == "python"
    out = tmp_path / "required"
    out.mkdir()
    done = build("wheel", tree, out, environment(tmp_path, CC="false", TAKEOVER_EXT="require"))
    assert done.returncode != 0
    assert re.search(r"\bfalse'.* (failed|returned non-zero)", done.stderr)
    assert not list(out.iterdir())


def test_skipping_makes_a_wheel_for_every_platform(tree: pathlib.Path, tmp_path: pathlib.Path) -> None:
    wheel = built("wheel", tree, tmp_path / "out", environment(tmp_path, TAKEOVER_EXT="skip"))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in content(wheel) if name.endswith(".so")]
    site = install(wheel, tmp_path / "site")
    assert run(site, environment(tmp_path), "import takeover; print(takeover.backend)") == "python"


def test_another_word_in_takeover_ext_is_refused(tree: pathlib.Path, tmp_path: pathlib.Path) -> None:
    done = build("wheel", tree, tmp_path, environment(tmp_path, TAKEOVER_EXT="maybe"))
    assert done.returncode != 0
    assert "TAKEOVER_EXT=maybe: must be auto, require or skip" in done.stderr
