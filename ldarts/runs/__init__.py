"""A run: its command line, its folder, and its results.

arguments: the flags of both scripts; folder: Run; checkpoints: files that appear whole; signals: stopping a
run; meters: losses and accuracies; machine: device, precision, seeds; derived: the network of
train_eval.py; records: reading run folders; results: the table of runs.
"""
from ..errors import script
from .arguments import Parser, one_of, parse_eval_args, parse_search_args, uses_graph
from .checkpoints import load_checkpoint, script_path, write_atomically
from .derived import check_images, count_multiply_adds, count_parameters, load_weights, safe_layout
from .folder import Run
from .machine import (AMP, MEMORY_FORMATS, amp_dtype, device_name, machine_facts, pick_device,
                      seed_everything, set_deterministic, versions)
from .meters import evaluate
from .records import read_config, read_metrics, read_run, unfinished
from .results import grouped, main, spread, table
