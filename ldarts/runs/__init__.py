"""A run: its command line, its folder, and what comes of it.

machine: device, precision, seeds; checkpoints: files that appear whole; signals: how a run is stopped, its
lock; meters: losses and accuracies; limits: of images and memory; folder: Run; arguments: what command lines
share; protocols: those of the two scripts; derived: the network of train_eval.py; results: the table of runs.
"""
from .arguments import Parser, add_run_arguments, read_config, script
from .checkpoints import load_checkpoint, write_atomically
from .derived import count_multiply_adds, count_parameters, load_weights, size_of
from .folder import Run
from .limits import require_passage
from .machine import (AMP, MEMORY_FORMATS, amp_dtype, device_name, pick_device, seed_everything,
                      set_deterministic, versions)
from .meters import evaluate
from .protocols import parse_eval_args, parse_search_args, uses_graph
from .results import grouped, main, read_metrics, read_run, spread, table
