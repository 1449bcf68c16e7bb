"""The text that ``repr(task)`` gives."""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tljax.tasks.task import Task

_MOST = 6
"""Most answers of a set that are shown."""


def shown(task: "Task") -> str:
    """Returns a few lines on a task, with its first prompt as an example."""
    if not all(isinstance(one, np.ndarray) for one in (task.answers, task.wrongs, task.templates)):
        return f"Task({task.name!r}, corruption={task.corruption!r}, traced)"
    templates = len(np.unique(task.templates))
    head = f"{task.clean!r}".removeprefix("Batch(").removesuffix(")")
    lines = [f"Task {task.name}, corruption {task.corruption}: {head}, {_many(templates, 'template')}"]
    lines += [f"  clean      {_prompt(task, 'clean')}", f"  corrupted  {_prompt(task, 'corrupted')}"]
    lines.append(f"  answer     {_ids(task, task.answers[0][task.answer_mask[0]])}")
    lines.append(f"  wrong      {_ids(task, task.wrongs[0][task.wrong_mask[0]])}")
    lines.append(f"  positions  {', '.join(f'{label} {_span(span[0])}' for label, span in task.spans.items())}")
    if task.dropped:
        lines.append(f"  left out   {', '.join(f'{count} ({why})' for why, count in task.dropped)}")
    return "\n".join(lines)


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _prompt(task: "Task", side: str) -> str:
    texts = getattr(task, f"{side}_texts")
    if texts is not None:
        return repr(texts[0])
    row = np.asarray(getattr(task, side).row(0)).tolist()
    return f"token ids {row if len(row) <= 2 * _MOST else [*row[: 2 * _MOST], '...']}".replace("'", "")


def _ids(task: "Task", ids: Any) -> str:
    few = ids[:_MOST].tolist()
    names = [str(one) for one in few]
    if task.tokenizer is not None and task.clean_texts is not None:
        names = [repr(piece) for piece in task.tokenizer.pieces(few)]
    return ", ".join(names) + (f", ... ({len(ids)} in all)" if len(ids) > len(few) else "")


def _span(bounds: Any) -> str:
    start, stop = (int(bound) for bound in bounds)
    return "absent" if start < 0 else str(start) if stop == start + 1 else f"{start} to {stop - 1}"
