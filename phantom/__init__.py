"""Head-CT phantoms with bleeds: synthetic scans for trying and for the default weights.

In come a seed and the atlas; out comes a dataset in the Decathlon's layout, one scan and one exact
mask a case. Open ``cases`` first, then ``person``, ``head``, ``bleeds`` and ``scanner``;
``findings`` draws what else heads show, ``synthesize`` is the command. Nothing here is a real
patient.
"""
