"""The command line.

    python <plugin folder> train     train from SimpleTuner's config.json, or go on with a training
    python <plugin folder> cache     encode its pictures and captions, without training
    python <plugin folder> validate  draw its prompts with the base model and with a LoRA
    python <plugin folder> check     is a configuration or dataset file understood, and what does this machine lack?
    python <plugin folder> init      a configuration for a folder of pictures and a size of memory
    python <plugin folder> estimate  how much memory a training will need, and which switch saves how much
    python <plugin folder> info      what a run, checkpoint, LoRA, dataset or configuration holds
    python <plugin folder> convert   a LoRA in another format, or several as one
    python <plugin folder> export    a whole model in another layout
    python <plugin folder> clean     remove what no dataset refers to from a cache folder

Each of them says more with --help, and prints one line of JSON on stdout with --json; all else goes to stderr.

Exit codes: 0 done (also where Ctrl+C or SIGTERM ended encoding or training and all is saved); 1 failed, the sentence
says why; 2 a file or the command line is not understood; 3 with check --strict: understood, and something is missing
here; 130 interrupted before there was anything to save, or twice.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys

from .command.answer import FAILED, KILLED, WRONG
from .errors import Lumina2Error, SettingError

COMMANDS = ("train", "cache", "validate", "check", "init", "estimate", "info", "convert", "export", "clean")
FOR_PROGRAMS = ("launched",)


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    first = argparse.ArgumentParser(
        prog="python <plugin folder>", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    first.add_argument("command", choices=(*COMMANDS, *FOR_PROGRAMS), metavar="command")
    chosen = first.parse_args(given[:1]).command
    module = importlib.import_module(f".command.{chosen}", __package__)  # the others, and what they need, stay out
    parser = argparse.ArgumentParser(
        prog=f"python <plugin folder> {chosen}", description=module.__doc__, allow_abbrev=False
    )
    module.add_arguments(parser)
    with contextlib.suppress(argparse.ArgumentError):  # it may have been added
        parser.add_argument("--json", action="store_true", help="one line of JSON on stdout")
    options, rest = parser.parse_known_args(given[1:])
    if rest and "rest" not in options:
        parser.error(f"there is no {rest[0]}")
    if rest:
        options.rest = rest
    try:
        answer = module.run(options)
    except Lumina2Error as error:
        print(error, file=sys.stderr)
        return WRONG if isinstance(error, SettingError) else FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return KILLED
    if answer.found or answer.text:  # of several processes one answers
        print(json.dumps(answer.found, ensure_ascii=False) if options.json else answer.text)
    return int(answer.code)


if __name__ == "__main__":
    sys.exit(main())
