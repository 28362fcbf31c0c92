"""What is on disk is whole: atomic files, sealed files, results on their way, and whose run a folder holds."""
