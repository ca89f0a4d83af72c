@echo off
rem Has Windows start the host agent whenever this user logs in, without a window, and starts it now.
rem at-logon remove: no longer.
setlocal
if "%1" == "remove" (
    schtasks /Delete /TN vmhost /F
    exit /b
)
set TASK=%TEMP%\vmhost-task.xml
powershell -NoProfile -Command "(Get-Content -Raw '%~dp0vmhost-task.xml').Replace('USER', $env:USERDOMAIN + '\' + $env:USERNAME).Replace('FOLDER', '%~dp0'.TrimEnd('\')) | Set-Content -Encoding Unicode $env:TASK"
schtasks /Create /TN vmhost /XML "%TASK%" /F && schtasks /Run /TN vmhost
del "%TASK%"
