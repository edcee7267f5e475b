"""Many processes: requests spread over ranks, models over devices, one long document over ranks."""
