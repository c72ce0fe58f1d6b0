"""One image at a time: decoded safely, fast where the file is a JPEG, and with its content taken away for a contrast.

Nothing here knows records or tokenizers.
"""
