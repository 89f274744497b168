"""Draw results/precision.png: precision over steps and time per recipe.

  python benchmarks/curves.py

This script reads results/runs.json, which lists the settings and throughput of
each run, and the metrics.jsonl that the evaluator wrote for it. Runs with
`seconds` of null were interrupted or ran beside others; their curves over time
use the median throughput of the recipe's other runs.
"""

import json
import os
import statistics

import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

RESULTS = os.path.join(os.path.dirname(__file__), '..', 'results')
PUBLISHED = 0.866  # precision at 150,000 steps according to the tutorial


def main():
  with open(os.path.join(RESULTS, 'runs.json')) as file:
    runs = json.load(file)
  names = list(dict.fromkeys(run['name'] for run in runs))
  figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
  for run in runs:
    steps, precisions, intervals = read_curve(run['metrics'])
    seconds_per_step = run['batch_size'] / throughput(run, runs)
    minutes = [step * seconds_per_step / 60 for step in steps]
    color = f'C{names.index(run["name"])}'
    for axis, x in zip(axes, (steps, minutes), strict=True):
      axis.fill_between(x, *intervals, color=color, alpha=0.15)
      axis.plot(x, precisions, '.-', color=color, label=run['name'])
  for axis in axes:
    axis.axhline(
      PUBLISHED, color='grey', linestyle=':', label='published, 150,000 steps'
    )
    axis.grid(alpha=0.3)
    axis.spines[['top', 'right']].set_visible(False)
  axes[0].set_xlabel('step')
  axes[0].set_ylabel('precision @ 1, with 95% intervals')
  axes[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
  axes[0].set_ylim(0.6, 0.9)
  axes[1].set_xscale('log')
  axes[1].xaxis.set_major_formatter('{x:g}')
  axes[1].set_xlabel('minutes of training')
  handles, labels = axes[1].get_legend_handles_labels()
  unique = dict(zip(labels, handles, strict=True))
  axes[1].legend(unique.values(), unique.keys(), loc='lower right')
  figure.tight_layout()
  figure.savefig(os.path.join(RESULTS, 'precision.png'), dpi=120)


def throughput(run, runs):
  """Return the examples per second of a run, or of those like it."""
  same = [it for it in runs if it['name'] == run['name']]
  timed = [it for it in same if it.get('seconds', 0) is not None]
  usable = [run] if run in timed else timed or same
  return statistics.median(it['examples_per_sec'] for it in usable)


def read_curve(name):
  """Return steps from 1, precisions, and the bounds of their intervals."""
  with open(os.path.join(RESULTS, name)) as file:
    records = [json.loads(line) for line in file]
  records = [record for record in records if record['step']]
  records.sort(key=lambda record: record['step'])
  lower, upper = zip(*(record['interval'] for record in records), strict=True)
  steps = [record['step'] for record in records]
  return steps, [record['precision'] for record in records], (lower, upper)


if __name__ == '__main__':
  main()
