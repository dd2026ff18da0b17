"""Shell completion that fixes click's for `--option=value` and, in fish, for values with commas."""

from __future__ import annotations

from click.shell_completion import BashComplete, CompletionItem, FishComplete, ShellComplete, ZshComplete


class Bash(BashComplete):
    def get_completion_args(self) -> tuple[list[str], str]:
        args, incomplete = super().get_completion_args()
        return [word for word in args if word != "="], incomplete  # bash splits `--option=value` into three words


class _WholeWord(ShellComplete):
    """For a shell that replaces the whole word, the option included."""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        found = super().get_completions(args, incomplete)
        option, equals, _ = incomplete.partition("=")
        if not equals or not option.startswith("-"):
            return found
        return [CompletionItem(f"{option}={item.value}") if item.type == "plain" else item for item in found]


class Zsh(_WholeWord, ZshComplete):
    pass


class Fish(_WholeWord, FishComplete):
    source_template = FishComplete.source_template.replace('string split ","', 'string split --max 1 ","')
