"""Puts the start-up hook, and in a wheel the task folder, beside the package (see `lminf_eval/plugin.py`)."""

from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# Named to sort after the path file of an editable install, which makes the package importable. It must be one line and
# must stay silent where the package is gone (an editable install whose checkout was moved): it runs at every start-up.
HOOK_NAME = "lminf_eval_autoload.pth"
HOOK = (
    'import sys; exec("try:\\n    import lminf_eval.plugin as plugin\\nexcept ImportError:\\n    pass\\n'
    'else:\\n    plugin.install()")\n'
)


class AutoloadHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict) -> None:
        hook = Path(self.directory) / HOOK_NAME
        hook.parent.mkdir(parents=True, exist_ok=True)
        hook.write_text(HOOK)
        build_data["force_include_editable"][str(hook)] = HOOK_NAME
        build_data["force_include"] |= {str(hook): HOOK_NAME, "tasks": "lminf_eval/tasks"}
