"""What the benchmarks on a GPU are made of; the commands are benches/gpu_bench.py, gpu_sweep.py and gpu_profile.py.

clock.py       device time, eager time, launches, waits of the host
cases.py       one operation's launches, hot and cold, and the check of what they wrote
operations.py  rows of pydrone's GAE, append and minibatch
others.py      the same of torch loops and other packages
iterations.py  storage, GAE and minibatches of an iteration; whole training iterations
targets.py     the figures to reach, and which rows reach them
variants.py    the kernels with other launch parameters
machine.py     what was measured, on what, and the file that it goes to
"""
