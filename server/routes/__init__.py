"""The HTTP resources, one module each: their paths, parameters and answers.

app.py puts the routes together; no route imports another. speech_response.py sends speech for any of them.
"""
