"""Find out where a compiled network differs from its reference, by how much, and why.

recording   what every call of a run was given and what it answered, in one npz file
compare     two networks over the same inputs (teacher-forced), or two runs call by call (free-running)
diagnose    the classic causes of a difference, recognised and said in words
report      the comparison as text; plot draws it
"""
