"""Text for `--help`: the flags of a program in two groups."""

import inspect
import os
import re
import sys
import textwrap

from absl import flags

from cifar10_suite.recipes import RECIPES

# The flags that most people need, in this order; all others come after them.
_MAIN_FLAGS = (
  'train_dir',
  'checkpoint_dir',
  'eval_dir',
  'data_dir',
  'recipe',
  'max_steps',
  'batch_size',
  'learning_rate',
  'num_gpus',
  'restart',
  'seed',
  'run_once',
  'until_trained',
  'report',
  'top_k',
  'export_dir',
  'saved_model',
)
_OF_RECIPES = ('max_steps', 'batch_size', 'learning_rate')  # overridden
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_COLUMN = 32  # where descriptions begin
_WIDTH = 80


def text() -> str:
  """Return the help of the main program: its purpose and its flags."""
  program = sys.modules['__main__'].__doc__ or ''
  known = {
    flag.name: flag
    for module in (sys.argv[0], 'cifar10_suite.cli')  # defines shared flags
    for flag in flags.FLAGS.get_key_flags_for_module(module)
  }
  main = [name for name in _MAIN_FLAGS if name in known]
  others = sorted(set(known) - set(main))
  return '\n'.join(
    [
      '\n\n'.join(inspect.cleandoc(program).split('\n\n')[:2]),
      '',
      *(_entry(known[name], 'recipe' in known) for name in main),
      '',
      'Rarely used:',
      *(_entry(known[name], 'recipe' in known) for name in others),
      '',
      '--helpfull explains all flags at length.',
    ]
  )


def _entry(flag: flags.Flag, has_recipe: bool) -> str:
  """Return the lines of a flag: name, default and first sentence."""
  name, default = flag.name, f' {flag.default}'
  if flag.default is None or isinstance(flag.default, bool):
    default = ''
  sentence = re.split(r'[.;] ', flag.help or '')[0].rstrip('.')
  if has_recipe and name in _OF_RECIPES:
    default = ''
    values = {it.name: f'{getattr(it, name)}' for it in RECIPES.values()}
    sentence += f' ({values.pop("tutorial")}'
    sentence += ''.join(f'; {it}: {value}' for it, value in values.items())
    sentence += ')'
  start = f'  --{name}{default.replace(f"{_ROOT}{os.sep}", "")}'
  return textwrap.fill(
    f'{start:<{_COLUMN - 1}} {sentence}',
    width=_WIDTH,
    subsequent_indent=' ' * _COLUMN,
  )
