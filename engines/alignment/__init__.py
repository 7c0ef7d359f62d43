"""Find out where a compiled network differs from its reference, by how much, and why.

recording   what every call of a run was given and what it answered, in one npz file
compare     two networks over the same inputs (teacher-forced), or two runs call by call (free-running)
causes      the classic causes of a difference, in words
diagnose_*  which of them it is: seen in two runs, or found by calling a network
report      the comparison as text; plot draws it
"""
SUFFIX = ".npz"                              # of a recording
LIMIT_BYTES = 512 << 20
WHEN_DIFFERENT, NO_CAUSES = LOOK_FOR_CAUSES = ("when it differs", "no")
