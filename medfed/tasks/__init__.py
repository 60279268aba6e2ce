"""What a model is adapted for: losses and metrics, one file per task family."""

from medfed.study_sections import ClassificationConfig, SegmentationConfig
from medfed.tasks.classification import ClassificationTask
from medfed.tasks.segmentation import SegmentationTask
from medfed.tasks.task import Task

__all__ = ["ClassificationTask", "SegmentationTask", "Task", "task_of"]


def task_of(config: SegmentationConfig | ClassificationConfig) -> Task:
    """The task that a study's ``[task]`` section describes."""
    if isinstance(config, SegmentationConfig):
        return SegmentationTask(config)
    return ClassificationTask(config)
