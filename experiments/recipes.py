from .tasks import Task

RECIPES: list[Task] = []


def dry_run(task, methods):
    yield ""
