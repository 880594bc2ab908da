"""Scores of lm-evaluation-harness for the folder named, by its own model of transformers and by quantkit's.

harness.py FOLDER TASKS_FOLDER task,task → one JSON object {"theirs": {task: {metric: value}}, "ours": …}
"""

import json
import sys

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from quantkit import api

folder, include, tasks = sys.argv[1:]
names = tasks.split(",")
model = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=4)
with torch.no_grad():
    found = lm_eval.simple_evaluate(
        model=model, tasks=names, task_manager=TaskManager(include_path=include), log_samples=False
    )
theirs = {task: {k.partition(",")[0]: v for k, v in row.items() if "," in k} for task, row in found["results"].items()}
ours = {}
for score in api.evaluate_tasks(folder, names, include=include):
    ours.setdefault(score.task, {})[score.metric] = score.value
    if score.error is not None:
        ours[score.task][f"{score.metric}_stderr"] = score.error
print(json.dumps({"theirs": theirs, "ours": ours}))
