"""Language models as harvest and evaluation need them: found, loaded, cut, listened to."""
