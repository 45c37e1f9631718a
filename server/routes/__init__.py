"""The HTTP resources, one module each: their paths, parameters and answers.

app.py puts the routes together; no route imports another.
"""
