"""Whether everybody who is to be told of a training will listen: asked before it starts."""

from __future__ import annotations

import os

from ..config.report import ReportSettings
from ..errors import Lumina2Error, SettingError
from .hub import hub_problem
from .trackers import check_package, packaged

WANDB_S = 15


def login_problems(settings: ReportSettings) -> list[str]:
    """What would fail later, each in a sentence with its remedy: packages, logins, webhooks' settings."""
    problems = []
    try:
        for name in packaged(settings):
            check_package(name)
            if name == "wandb":
                problems += wandb_problem()
    except Lumina2Error as error:
        problems.append(str(error))
    try:
        settings.webhooks()
    except Lumina2Error as error:
        problems.append(str(error))
    if settings.pushes and (problem := hub_problem(settings)):
        problems.append(problem)
    return problems


def check_logins(settings: ReportSettings) -> None:
    """Raises SettingError with every problem; nothing is asked of anybody who is not to be told."""
    if problems := login_problems(settings):
        raise SettingError(" ".join(problems))


def wandb_problem() -> list[str]:
    """Why wandb would not take a run. Offline runs need no login."""
    import wandb

    if os.environ.get("WANDB_MODE", "online").lower() in ("offline", "disabled", "dryrun"):
        return []
    remedy = "Run `wandb login` in a terminal, set WANDB_API_KEY in ComfyUI's environment, or set WANDB_MODE=offline."
    try:
        try:
            known = wandb.login(prompt=False, timeout=WANDB_S)
        except TypeError:  # wandb before 0.31 would ask on the terminal
            known = bool(wandb.api.api_key)
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        return [f"report_to wandb: the login was not accepted ({said}). {remedy}"]
    return [] if known else [f"report_to wandb: nobody is logged in. {remedy}"]
