@echo off
rem Has Windows start the host agent whenever this user logs in, without a window, and starts it now.
rem at-logon remove: no longer.
setlocal DisableDelayedExpansion
if /i "%~1" == "remove" (
    schtasks /Delete /TN vmhost /F
    exit /b
)
if not "%~1" == "" (
    echo usage: at-logon, or at-logon remove 1>&2
    exit /b 2
)
set "TASK=%TEMP%\vmhost-task.xml"
set "HERE=%~dp0"
powershell -NoProfile -Command "$xml = [Security.SecurityElement]; (Get-Content -Raw -LiteralPath ($env:HERE + 'vmhost-task.xml')).Replace('USER', $xml::Escape($env:USERDOMAIN + '\' + $env:USERNAME)).Replace('FOLDER', $xml::Escape($env:HERE.TrimEnd('\'))) | Set-Content -Encoding Unicode -LiteralPath $env:TASK"
schtasks /Create /TN vmhost /XML "%TASK%" /F && schtasks /Run /TN vmhost
del "%TASK%"
