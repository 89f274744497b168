"""Test that the notebook runs, on a small data set."""

import os

import nbclient
import nbformat
from support.programs import ROOT, TIMEOUT


def test_runs_from_start_to_end(data_dir):
  docs = os.path.join(ROOT, 'docs')
  notebook = nbformat.read(os.path.join(docs, 'notebook.ipynb'), as_version=4)
  flag = nbformat.v4.new_code_cell(
    f"import sys; sys.argv.append('--data_dir={data_dir}')"
  )
  notebook.cells.insert(0, flag)
  for cell in notebook.cells:
    cell.source = cell.source.replace('STEPS = 200', 'STEPS = 3')
  nbclient.NotebookClient(
    notebook, timeout=TIMEOUT, resources={'metadata': {'path': docs}}
  ).execute()
  outputs = [it for cell in notebook.cells for it in cell.get('outputs', [])]
  texts = ''.join(it.text for it in outputs if it.output_type == 'stream')
  assert 'step 0, loss = ' in texts and '% of 128 are right' in texts
  assert {it.name for it in outputs if 'name' in it} == {'stdout'}, texts
  pictures = [it for it in outputs if 'image/png' in it.get('data', {})]
  assert len(pictures) == 2
