"""The judge of the operations: references, cases, comparisons, poisoned memory, fuzzing.

oracle.py    what every operation should return, in float64, from its definition
cases.py     sizes, options, types and layouts of a call, and the tensors they make
poison.py    NaN-filled allocations, red zones around every argument
compare.py   the 2x rule, and check_call: everything one call must satisfy
fuzz.py      a random case from one integer
modules.py   every module, small, and how it is run
registration.py  what only libmamba_ssm.so has
"""
