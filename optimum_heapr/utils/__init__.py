# Licensed under the Apache License, Version 2.0
"""Small helpers that every stage of the pipeline shares: errors, logging, safe files."""
