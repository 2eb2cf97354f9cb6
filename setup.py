"""Puts `configs/`, which lies beside the package, into the wheel. All else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigurations(build_py):
    """Copies `configs/*.yaml` to `dsrl_async/configs`; an editable install reads them where they are."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "dsrl_async" / "configs"
            target.mkdir(parents=True, exist_ok=True)
            for path in sorted(Path("configs").glob("*.yaml")):
                self.copy_file(str(path), str(target / path.name))


setup(cmdclass={"build_py": BuildWithConfigurations})
