"""What the CIFAR-10 suite has beyond TensorFlow's tutorial.

The tutorial's modules and the programs are beside this package and import from
it. Nothing here imports them.
"""
