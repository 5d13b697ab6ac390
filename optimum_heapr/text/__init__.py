# Licensed under the Apache License, Version 2.0
"""From data sources to documents and samples: everything that reads text comes here."""
