"""What a student is used for: maps of photographs, folders and videos."""
