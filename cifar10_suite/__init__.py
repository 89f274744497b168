"""Parts of the CIFAR-10 suite that TensorFlow's tutorial did not have.

The tutorial's modules and the programs, which are next to this package, import
from it. No module of this package imports them.
"""

__version__ = '1.2.0.dev0'
