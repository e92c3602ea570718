"""What is watched while a run trains: alarms, non-finite values, hanging steps, progress, speed."""
