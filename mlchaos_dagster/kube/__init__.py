"""What drivers, probes and the sweeper share about a Kubernetes cluster.

client.py     one API server: verbs on JSON objects, exec, access reviews; bounded, rate-limited, errors in one line
address.py    which cluster an environment means, and that it still is that cluster
refs.py       frozen ids of objects (`pod/NAMESPACE/NAME@UID`)
selecting.py  from a target's selector to objects
labels.py     by which everything of ours is found
"""
