"""A program that judges boxes with nuscenes-devkit, for a Python that has it: JSON in, JSON out.

It imports nothing of this project: the devkit needs an older NumPy than the rest.
"""

import json
import math
import sys

from nuscenes.eval.common.data_classes import EvalBoxes
from nuscenes.eval.common.utils import center_distance
from nuscenes.eval.detection.algo import accumulate, calc_ap, calc_tp
from nuscenes.eval.detection.constants import TP_METRICS
from nuscenes.eval.detection.data_classes import DetectionBox
from pyquaternion import Quaternion

ATTRIBUTES = ["vehicle.moving", "vehicle.parked", "vehicle.stopped"]


def read(boxes: list, num_samples: int) -> EvalBoxes:
    read = EvalBoxes()
    for sample in range(num_samples):
        read.add_boxes(str(sample), [])
    for box in boxes:
        read.add_boxes(
            str(box["sample"]),
            [
                DetectionBox(
                    sample_token=str(box["sample"]),
                    translation=tuple(box["center"]),
                    size=tuple(box["size"]),
                    rotation=tuple(Quaternion(axis=(0, 0, 1), angle=box["yaw"])),
                    velocity=tuple(math.nan if v is None else v for v in box["velocity"]),
                    detection_name=box["name"],
                    detection_score=box["score"],
                    attribute_name=ATTRIBUTES[box["attribute"]] if box["attribute"] >= 0 else "",
                )
            ],
        )
    return read


def main() -> None:
    document = json.load(sys.stdin)
    truth, found = (read(document[key], document["num_samples"]) for key in ("truth", "detections"))
    result = {}
    for name in document["classes"]:
        by_distance = {d: accumulate(truth, found, name, center_distance, d) for d in document["distances"]}
        errors = {metric: calc_tp(by_distance[2.0], 0.1, metric) for metric in TP_METRICS}
        result[name] = {"AP": {d: calc_ap(data, 0.1, 0.1) for d, data in by_distance.items()}, "errors": errors}
    json.dump(result, sys.stdout)


main()
